"""Answers to prompts: what a sampler is asked, the sampler's own process, shards of answers."""
