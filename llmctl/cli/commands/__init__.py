"""The commands that are not stages: one file each, found by its name.

`commands/x.py` holds one function `x` with typer's annotations; its docstring is the help. Heavy modules are imported
inside the function. Output goes through `llmctl.pipeline.console`: `result` prints JSON for `--json`, `show` prints
results for people, `say` prints progress.
"""
