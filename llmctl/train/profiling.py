"""Profile a few training steps for TensorBoard's profile plugin and XProf."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class Profile:
    """Trace the steps `first:last` (counted from 1, both included). The context manager ends an unfinished trace.

    If `steps` is empty, nothing is traced. The trace is written to `folder`, the folder of TensorBoard's events.
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
        """Start the trace if `step` is one of the steps to trace.

        Call this before each step. A resumed run traces the remaining steps.
        """
        if self.first <= step <= self.last and not self._running:
            jax.profiler.start_trace(self.folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """End the trace if `step` is the last step to trace. Call this after each step is dispatched.

        At the end of the trace, the method waits for `results`.
        """
        if self._running and step >= self.last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
