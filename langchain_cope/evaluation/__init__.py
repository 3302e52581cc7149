"""How near each way of answering comes to what the user wrote, side by side on held-out items.

Read `ways.py` (what is compared), then `evaluate.py` (the ways of a personalization) or `users.py`
(many users, many ways).
"""
