"""Define the models: one Transformer for all families, with weights, losses and text generation."""
