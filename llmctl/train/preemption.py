"""A polite end: SIGTERM and Ctrl-C ask for a checkpoint, and all processes of a run heed it at the same step."""

from __future__ import annotations

import contextlib
import signal
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
"""Steps after which an answer of all processes is read: by then it is there, and reading it waits for nothing."""


class Asked(Interrupted):
    """Somebody asked for an end in the middle of what can be left undone."""


class Stop:
    """Whether somebody asked for an end. Of several processes each says what it was told, and all hear the same."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.told = threading.Event()
        """This process was asked."""
        self.agreed = False
        """All processes know of it."""
        self._answers: deque[jax.Array] = deque()
        every = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._every, self._size = every, mesh.size
        self._any = jax.jit(lambda told: told.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def asked(self, now: bool = False) -> bool:
        """All processes call it after each step; of several the answer is what was known `LAG` calls ago, or `now`."""
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
    """Raises Asked where somebody asked the run in progress for an end; all processes call it, in the same order."""
    stop = _current.get()
    if stop and stop.asked():
        raise Asked("stopped while validating; the same command goes on from the last checkpoint")


@contextlib.contextmanager
def requests(mesh: jax.sharding.Mesh) -> Iterator[Stop]:
    """SIGTERM and the first Ctrl-C ask for a checkpoint and an end; a second Ctrl-C ends at once."""
    stop = Stop(mesh)

    def ask(number: int, frame: Any) -> None:
        stop.told.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    heard = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before, token = {s: signal.signal(s, ask) for s in heard}, _current.set(stop)
    try:
        yield stop
    finally:
        _current.reset(token)
        for s, handler in before.items():
            signal.signal(s, handler)
    if stop.told.is_set():  # it came after the last look, while a checkpoint was still being written
        raise Interrupted("stopped after the last checkpoint; the same command goes on from there")
