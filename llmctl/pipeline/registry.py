"""List the commands from their source files, without importing them, so that `--help` is fast.

A stage is a file in `llmctl/pipeline/stages` with a class `Config`. Any other command is a file in
`llmctl/cli/commands` with a function of the file's name. If the name is a Python keyword, file and function end in an
underscore (`import_.py`).
"""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

STAGES = Path(__file__).parent / "stages"
COMMANDS = Path(__file__).parent.parent / "cli" / "commands"
ORDER = (
    *("run", "pretrain", "finetune", "prune", "quantize", "distill", "eval"),
    *("predict", "explain", "generate", "import", "export", "prepare", "plan", "show", "verify", "report", "doctor"),
)
"""Order of the commands in the help. Other commands follow, sorted by name."""


def stages() -> list[str]:
    """Return the kinds of all stages."""
    return _found(STAGES)


def commands() -> list[str]:
    """Return the names of all commands that are not stages."""
    return _found(COMMANDS)


def module(name: str) -> str:
    """Return the module name of a stage or a command."""
    return f"llmctl.pipeline.stages.{name}" if name in stages() else f"llmctl.cli.commands.{symbol(name)}"


def symbol(name: str) -> str:
    """Return the name of a command's file and function.

    File and function have the command's name, plus an underscore if the name is a Python keyword.
    """
    return name if (COMMANDS / f"{name}.py").exists() else f"{name}_"


def summary(name: str) -> str:
    """Return the first paragraph of a command's docstring, read from its source."""
    stage = name in stages()
    source = (STAGES / f"{name}.py") if stage else (COMMANDS / f"{symbol(name)}.py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    wanted = "Config" if stage else symbol(name)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == wanted and ast.get_docstring(node):
            return (ast.get_docstring(node) or "").split("\n\n")[0]
    return (ast.get_docstring(tree) or "").split("\n\n")[0]


def _found(folder: Path) -> list[str]:
    found = {m.name.rstrip("_") for m in pkgutil.iter_modules([str(folder)])}
    return [n for n in ORDER if n in found] + sorted(found - set(ORDER))
