"""Run the work of a preparation in parallel processes, each with its own sources and tokenizer."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from llmctl.config.errors import Interrupted
from llmctl.data import columns
from llmctl.data.columns import View
from llmctl.data.config import DataConfig
from llmctl.data.source import Chain
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer

Pool = Callable[[Callable[["Worker", Any], Any], Iterable[Any]], Iterator[Any]]
"""Function (f, items) that calls f(worker, item) for all items in parallel, and yields the results in order."""


class Worker:
    """Store the opened sources and the tokenizer of one worker process."""

    def __init__(self, data: DataConfig, work: Path):
        self.data, self.work = data, work

    @functools.cached_property
    def views(self) -> list[View]:
        """Open the sources of the data config, once per process."""
        return columns.views(self.data, labels=False)

    @functools.cached_property
    def source(self) -> Chain:
        """Return all sources of the data config, concatenated into one source."""
        return Chain(self.views)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer, which the main process writes before the first shard."""
        return tokenizers.load(self.work / "tokenizer")


@contextlib.contextmanager
def processes(data: DataConfig, work: Path, workers: int) -> Iterator[Pool]:
    """Start `workers` processes, and yield a function that runs calls in these processes (see `Pool`).

    The processes end at the end of the `with` statement. With one worker, this process does the work.
    """
    if workers == 1:
        worker = Worker(data, work)
        yield lambda function, tasks: (function(worker, task) for task in tasks)
        return
    # Processes are spawned, because a fork of a process with threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (data, work)) as pool:
        try:
            yield lambda function, tasks: pool.map(functools.partial(_run, function), tasks)
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("interrupted; the same command goes on with the shards that are missing") from None
            raise


_worker: Any = None
"""Sources and tokenizer that this worker process has opened; None in the main process."""


def _start(data: DataConfig, work: Path) -> None:
    global _worker
    # Ctrl-C reaches the whole process group, but only the parent handles it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _worker = Worker(data, work)


def _follow_parent() -> None:
    """Exit this worker process when its parent process ends.

    If the parent is killed, its workers would otherwise wait forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(function: Callable[[Worker, Any], Any], task: Any) -> Any:
    return function(_worker, task)
