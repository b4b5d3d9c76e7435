"""Compute metrics from true labels and predictions."""
