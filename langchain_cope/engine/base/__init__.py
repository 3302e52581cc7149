"""What is loaded: the base model, its fingerprint, chat template and reply format."""
