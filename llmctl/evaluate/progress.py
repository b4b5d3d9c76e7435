"""Show how many batches of a measurement are done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmctl.config.terminal import terminal


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on standard error, if standard error is a terminal.

    Args:
        what: Name of the work; empty shows no bar.
        total: Number of batches.

    Yields:
        A function that advances the bar by one batch.
    """
    console = terminal(stderr=True)
    if not what or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
