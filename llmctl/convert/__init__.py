"""Import and export models: Hugging Face folders, GGUF files and PEFT adapters, verified by comparing outputs."""
