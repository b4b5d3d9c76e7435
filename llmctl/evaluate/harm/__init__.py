"""Filter generated text, and measure toxicity, memorization and contamination."""
