"""Tasks: one record owns every fact about what a model is finetuned for and measured on."""
