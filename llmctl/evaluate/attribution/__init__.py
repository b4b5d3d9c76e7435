"""Attribute a model's output to the tokens of its input, and show the attributions as JSON, HTML and PNG."""
