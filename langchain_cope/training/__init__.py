"""The training chain: TRL and peft on the engine's base. It knows no LangChain and no store; it returns a folder."""
