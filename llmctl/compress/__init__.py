"""Compress a trained model: calibration, pruning, structured pruning, quantization."""
