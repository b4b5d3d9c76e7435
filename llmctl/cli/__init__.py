"""Define the command line: its Typer app, the flags that are generated from config classes, and all commands except
stages.
"""
