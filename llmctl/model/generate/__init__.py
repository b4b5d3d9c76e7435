"""Generate text: decoding with a key-value cache, sampling, beam search, chat, and mask filling."""
