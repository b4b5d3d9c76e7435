"""Data: sources, tokenizers, rows of examples and of pretraining text, and batches on devices."""
