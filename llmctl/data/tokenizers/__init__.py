"""Tokenizers: bytes, SentencePiece and tokenizer.json with one interface."""
