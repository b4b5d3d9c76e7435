"""Making a trained model smaller: calibration, pruning, structured pruning, quantization."""
