"""What one call of `PersonalizeUser` is made of.

Read `run.py` first, the whole path; then `held_out.py` (what is judged by), `job_folder.py` (how it
goes on after a crash), `verdict.py` (whether an adapter helps) and `gate.py` (publishing).
"""
