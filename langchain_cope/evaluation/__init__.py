"""How near each way of answering comes to what the user wrote, side by side on held-out items.

Read `ways.py` (what is compared), `evaluate.py` (how), then `comparison.py` (one user, whole).
"""
