"""What a model is worth: its answers to held-out prompts, scored."""
