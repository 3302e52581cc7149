"""The command `cope-lc`. `main.py` is the entry; each command has a module of its own.

Nothing heavy is imported before a command runs: every module here imports torch, LangChain, pydantic and rich inside its functions.
"""
