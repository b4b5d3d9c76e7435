"""The commands that are not stages: one file each, found by its name.

`commands/x.py` holds one function `x` with typer's annotations; its docstring is the help. Where the name is a Python
keyword both end in an underscore (`import_.py`). Heavy modules are imported inside the function.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ORDER = ("run", "generate", "import", "export", "prepare", "plan", "show", "report", "doctor")


def names() -> list[str]:
    """Every command, from the file names."""
    found = {m.name.rstrip("_") for m in pkgutil.iter_modules(__path__)}
    return [c for c in ORDER if c in found] + sorted(found - set(ORDER))


def load(name: str) -> Callable[..., Any]:
    """The command's function."""
    files = {m.name.rstrip("_"): m.name for m in pkgutil.iter_modules(__path__)}
    return getattr(importlib.import_module(f"{__name__}.{files[name]}"), files[name])
