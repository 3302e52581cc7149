"""The command `cope-lc`. `main.py` is the entry; each command has a module of its own.

A module here imports torch, LangChain, pydantic, rich, `langchain_cope` and `adapter_store` inside
its functions only, so that nothing heavy is loaded before a command runs.
"""
