"""Define one Transformer for all model families, with weights, losses and text generation."""
