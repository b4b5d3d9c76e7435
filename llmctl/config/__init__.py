"""Settings: frozen, strict configuration classes, the sections that stages share, and errors."""
