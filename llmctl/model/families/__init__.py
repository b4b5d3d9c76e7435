"""Model families: flags and sizes on the shared blocks, and name maps to Hugging Face."""
