"""Text generation: key-value cache decoding, sampling, beam search, chat, and filled masks."""
