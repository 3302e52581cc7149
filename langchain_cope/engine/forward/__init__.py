"""From token ids to logits: the model's forward pass, its key-value cache and the rows' LoRA products."""
