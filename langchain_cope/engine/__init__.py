"""The contrastive engine: torch and transformers only. It knows no LangChain and no store; it is handed token ids and a folder."""
