"""From token ids to logits: the model's forward, its key-value cache, the rows' LoRA products."""
