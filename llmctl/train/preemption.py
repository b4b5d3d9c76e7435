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
"""Number of steps after which the result of an exchange of stop requests is read. The exchange is then finished, so
reading does not wait."""


class StopRequested(Interrupted):
    """Signal that a stop was requested during work that can be aborted, such as a validation."""


class Stop:
    """Exchange stop requests between the processes of a run, so that all processes stop at the same step."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.signalled = threading.Event()
        """Event that is set when this process has received SIGTERM or Ctrl-C."""
        self.agreed = False
        """Whether this run stops: the processes have exchanged their requests, and at least one process received a
        signal.
        """
        self._answers: deque[jax.Array] = deque()
        every = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._every, self._size = every, mesh.size
        self._any = jax.jit(lambda signalled: signalled.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def requested(self, now: bool = False) -> bool:
        """Return whether any process received a stop request. All processes must call this method after each step.

        In a run of several processes, the result comes from the exchange that started `LAG` calls ago. If `now` is
        true, the result includes all exchanges that have started.
        """
        if processes.count() == 1:
            self.agreed = self.signalled.is_set()
        elif not self.agreed:
            mine = np.array([self.signalled.is_set()])
            requests_of_all = jax.make_array_from_callback((self._size,), self._every, lambda _: mine)
            self._answers.append(self._any(requests_of_all))
            while self._answers and (now or len(self._answers) > LAG):
                self.agreed |= bool(self._answers.popleft())
        return self.agreed


_current: ContextVar[Stop | None] = ContextVar("stop", default=None)


def raise_if_requested() -> None:
    """Raise StopRequested if any process of the run received a stop request.

    All processes must call this function in the same order.
    """
    stop = _current.get()
    if stop and stop.requested():
        raise StopRequested("stopped while validating; the same command goes on from the last checkpoint")


@contextlib.contextmanager
def requests(mesh: jax.sharding.Mesh) -> Iterator[Stop]:
    """Handle signals in this context, and yield a `Stop`, whose method `requested` returns whether the run has to stop.

    SIGTERM and the first Ctrl-C request a checkpoint and a stop. A second Ctrl-C exits immediately.

    Raises:
      Interrupted: If a signal arrived after the last check. The error is raised at the end of the context.
    """
    stop = Stop(mesh)

    def ask(number: int, frame: Any) -> None:
        stop.signalled.set()
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
    if stop.signalled.is_set():  # the signal came after the last check, during the final save
        raise Interrupted("stopped after the last checkpoint; the same command goes on from there")
