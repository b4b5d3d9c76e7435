"""Define settings: frozen, strict configuration classes, sections that stages share, and error classes."""
