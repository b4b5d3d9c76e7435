"""Models: one Transformer for every family, its weights, losses and generation."""
