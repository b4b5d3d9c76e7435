"""Define immutable settings classes with strict validation, settings that several stages share, and errors."""
