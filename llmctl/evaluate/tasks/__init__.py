"""Tasks: one record has all facts about a task that models are finetuned for and measured on."""
