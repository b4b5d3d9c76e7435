"""Finetune models with few trained parameters."""
