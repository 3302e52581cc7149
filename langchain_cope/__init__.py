"""Every user answered in that user's own manner, on one local base model (CoPe)."""
