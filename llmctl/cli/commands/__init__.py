"""Define the commands that are not stages. Each file of this folder is one command.

`commands/x.py` contains one function `x` with Typer's annotations. The docstring of this function is the help text.
Large modules are imported inside the function. Output is printed by `llmctl.pipeline.console`: `result` prints JSON for
`--json`, `show` prints results as text, `say` prints progress.
"""
