"""Tokenizers: bytes, SentencePiece and tokenizer.json behind one interface."""
