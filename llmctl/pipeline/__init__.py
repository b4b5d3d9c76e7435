"""Pipelines: recipes, the registry of stages and commands, and the runner."""
