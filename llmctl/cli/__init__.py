"""Define the command line: the Typer app, flags generated from config classes, and the commands that are not stages."""
