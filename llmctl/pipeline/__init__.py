"""Read recipes, register stages and commands, and run stages."""
