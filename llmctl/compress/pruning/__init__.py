"""Prune single weights: set the weights with the lowest scores to zero, or run SparseGPT."""
