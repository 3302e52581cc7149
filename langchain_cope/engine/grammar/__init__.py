"""What may come next where an answer must fit a schema."""
