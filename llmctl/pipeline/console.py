"""Print the output of commands: results to stdout, everything else to stderr. Only process 0 prints."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmctl.distributed import processes

if TYPE_CHECKING:
    from collections.abc import Iterator


def say(text: str) -> None:
    """Print one line for people to stderr."""
    if processes.first():
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def result(value: Any) -> None:
    """Print one JSON object to stdout. Numbers that JSON lacks (NaN, infinities) become null."""
    if processes.first():
        sys.stdout.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str) + "\n")


def show(renderable: Any) -> None:
    """Print a table or a text for people to stdout. If stdout is no terminal, lines are not cut to a width."""
    if not processes.first():
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    console.print(renderable, highlight=False)


@contextlib.contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    """Yield `path`, or a temporary folder if the result is only printed."""
    if path:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llmctl-") as temporary:
        yield Path(processes.tell(lambda: temporary)) / "result"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value
