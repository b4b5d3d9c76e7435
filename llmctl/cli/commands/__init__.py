"""The commands that are not stages: one file each, found by its name.

`commands/x.py` holds one function `x` with typer's annotations; its docstring is the help. Heavy modules are imported
inside the function. Results go through `llmctl.console`: `result` for `--json`, `show` for people, `say` for what
happens.
"""
