"""Add adversarial training and regularization to finetuning, for any task."""
