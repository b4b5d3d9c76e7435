"""Weights that come from elsewhere and go there: Hugging Face folders, GGUF files, adapters; and the proof that they fit."""
