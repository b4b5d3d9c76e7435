"""Prune single weights: set those with the lowest scores to zero, or run SparseGPT."""
