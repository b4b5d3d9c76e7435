"""Print the output of commands: results to stdout, everything else to stderr. Only process 0 prints."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config.terminal import as_json, terminal
from llmctl.distributed import processes

if TYPE_CHECKING:
    from collections.abc import Iterator


def say(text: str) -> None:
    """Print one line of text to stderr."""
    if processes.first():
        terminal(stderr=True).print(text, soft_wrap=True)


def note(renderable: Any) -> None:
    """Print a table to stderr. If stderr is not a terminal, lines are not truncated to a width."""
    if processes.first():
        screen = terminal(stderr=True)
        (screen if screen.is_terminal else terminal(stderr=True, width=400)).print(renderable)


def result(value: Any) -> None:
    """Print one JSON object to stdout. Numbers that JSON lacks (NaN, infinities) become null."""
    if processes.first():
        sys.stdout.write(as_json(value) + "\n")


def show(renderable: Any, *, stderr: bool = False) -> None:
    """Print a table or a text to stdout or stderr. If the stream is not a terminal, lines are not truncated to a
    width.
    """
    if processes.first():
        screen = terminal(stderr=stderr)
        (screen if screen.is_terminal else terminal(stderr=stderr, width=400)).print(renderable)


@contextlib.contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    """Yield `path`. If `path` is None, yield a path in a temporary folder that is removed afterwards."""
    if path:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llmctl-") as temporary:
        yield Path(processes.broadcast(lambda: temporary)) / "result"
