"""A trace of a few training steps, as TensorBoard's profile plugin and XProf open it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class Profile:
    """Traces the steps `first:last` (from 1, both included); a context manager that ends a trace under way.

    Nothing where `steps` is empty. The folder is the one that TensorBoard reads: the trace stands beside the curves.
    """

    def __init__(self, steps: str, folder: Path) -> None:
        first, _, last = steps.partition(":")
        self.first, self.last = (int(first), int(last)) if steps else (0, 0)
        self.folder, self._running = folder, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Call it before `step` is begun; a run resumed in the middle traces the rest."""
        if self.first <= step <= self.last and not self._running:
            jax.profiler.start_trace(self.folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Call it when `step` has been dispatched; at the last one its results are waited for."""
        if self._running and step >= self.last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
