"""llmctl: from raw text to a small, fast, measured language model."""

__version__ = "0.1.0"
