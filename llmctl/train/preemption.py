"""Stop training at SIGTERM or Ctrl-C with a checkpoint, at the same step in all processes of a run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmctl.config.errors import Interrupted
from llmctl.distributed import processes

LAG = 2
"""Number of steps between the exchange of stop requests and the reading of its result. The result has arrived by then,
so reading does not wait."""


class Asked(Interrupted):
    """Signal a stop request during work that can be aborted, such as a validation."""


class Stop:
    """Exchange stop requests between the processes of a run, so that all processes stop at the same step."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.told = threading.Event()
        """Whether this process received a signal."""
        self.agreed = False
        """Whether all processes have received the request."""
        self._answers: deque[jax.Array] = deque()
        every = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._every, self._size = every, mesh.size
        self._any = jax.jit(lambda told: told.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def asked(self, now: bool = False) -> bool:
        """Return whether a stop was requested. All processes must call this method after each step.

        If a run has several processes, the answer is `LAG` calls old. If `now` is true, it includes the current
        requests.
        """
        if processes.count() == 1:
            self.agreed = self.told.is_set()
        elif not self.agreed:
            mine = np.array([self.told.is_set()])
            said = jax.make_array_from_callback((self._size,), self._every, lambda _: mine)
            self._answers.append(self._any(said))
            while self._answers and (now or len(self._answers) > LAG):
                self.agreed |= bool(self._answers.popleft())
        return self.agreed


_current: ContextVar[Stop | None] = ContextVar("stop", default=None)


def heed() -> None:
    """Raise Asked if a stop of the current run was requested.

    All processes must call this function in the same order.
    """
    stop = _current.get()
    if stop and stop.asked():
        raise Asked("stopped while validating; the same command goes on from the last checkpoint")


@contextlib.contextmanager
def requests(mesh: jax.sharding.Mesh) -> Iterator[Stop]:
    """Handle signals in this context, and yield the Stop of the run.

    SIGTERM and the first Ctrl-C request a checkpoint and a stop. A second Ctrl-C exits immediately.

    Raises:
      Interrupted: at the end of the context, if a signal arrived after the last check.
    """
    stop = Stop(mesh)

    def ask(number: int, frame: Any) -> None:
        stop.told.set()
        if number == signal.SIGINT and sys.stderr.isatty():  # a step may take minutes on a slow machine
            os.write(2, b"\nstopping: this step is finished and a checkpoint written; a second Ctrl-C exits at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    heard = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before, token = {s: signal.signal(s, ask) for s in heard}, _current.set(stop)
    try:
        yield stop
    finally:
        _current.reset(token)
        for s, handler in before.items():
            signal.signal(s, handler)
    if stop.told.is_set():  # the signal came after the last check, during the final save
        raise Interrupted("stopped after the last checkpoint; the same command goes on from there")
