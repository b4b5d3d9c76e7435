"""Define the command line: its Typer app, the flags made from config classes, and the commands that are not stages."""
