"""The training chain: TRL and peft on the engine's base; the result is a folder.

Read `pipeline.py` first. Knows no LangChain and no store.
"""
