"""Weights from and for elsewhere: Hugging Face folders, GGUF files, adapters; and the proof that they are the same."""
