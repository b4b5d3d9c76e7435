"""Run calibration data through a model layer by layer, to measure and to change its layers."""
