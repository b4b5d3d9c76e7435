"""Measuring artifacts: what a model gets right, how well it predicts text, how fast it is."""
