"""Quantize weights: store them as integers or floats of 2 to 8 bits, with scales."""
