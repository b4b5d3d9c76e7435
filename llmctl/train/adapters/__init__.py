"""Parameter-efficient finetuning."""
