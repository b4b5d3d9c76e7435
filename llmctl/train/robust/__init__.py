"""Finetune robustly, with any task: adversarial training on embeddings, and regularization."""
