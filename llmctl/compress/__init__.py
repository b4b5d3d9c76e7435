"""Compress a trained model by pruning, structured pruning and quantization, with calibration data."""
