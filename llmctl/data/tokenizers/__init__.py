"""Tokenize text with one interface for bytes, SentencePiece models and tokenizer.json files."""
