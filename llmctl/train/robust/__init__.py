"""Finetune robustly, for any task: adversarial perturbations of the embeddings, and regularization."""
