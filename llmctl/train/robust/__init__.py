"""Robust finetuning: adversarial training on embeddings, and regularization. Both are options of any task."""
