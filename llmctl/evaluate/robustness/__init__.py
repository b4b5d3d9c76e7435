"""Measure how much worse a model predicts if its input texts are changed."""
