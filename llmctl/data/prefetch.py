"""Pipeline: rows become batches in background threads, ahead of the step that consumes them.

Step k holds rows [k * B, (k + 1) * B). The only state is the next step, so stopping and going on, on any number of
processes, gives the same global batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grain
import numpy as np

from llmctl.data.pretraining.objectives import Batch

T = TypeVar("T")


class Rows(Protocol):
    """Random-access rows; `batch` builds many at once."""

    def __len__(self) -> int: ...

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Rows of these numbers as arrays with leading [B]."""
        ...


class _Steps(Generic[T]):
    """Batch number k, for Grain to read: random access, so that threads may build several at once."""

    def __init__(self, build: Callable[[int], T], steps: int):
        self._build, self._steps = build, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> T:
        return self._build(int(index))


class Batches(Iterator[tuple[int, T]], Generic[T]):
    """Iterator of (step, batch). Use it as a context manager, or `close` it: it holds threads.

    A failure in a thread is raised by `next` at the step it belongs to.
    """

    def __init__(self, build: Callable[[int], T], start: int, stop: int, threads: int, buffer: int):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        steps = grain.MapDataset.source(_Steps(build, stop)).to_iter_dataset(options)
        self._iterator = iter(steps)
        self._step = start
        self._iterator.set_state({"next_index": start})
        self.wait_seconds = 0.0
        """Time spent in `next` so far: what the input costs the training loop."""

    @property
    def step(self) -> int:
        """The step that `next` gives."""
        return self._step

    def get_state(self) -> dict[str, int]:
        """What a checkpoint keeps: the next step."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on (or back) to a saved state."""
        self._step = state["step"]
        self._iterator.set_state({"next_index": self._step})

    def __next__(self) -> tuple[int, T]:
        begun = time.perf_counter()
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - begun
        self._step += 1
        return self._step - 1, batch

    def close(self) -> None:
        """Ends the threads; what they have begun is thrown away. Idempotent."""
        self._iterator.close()

    def __enter__(self) -> Batches[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_iterator"):
            self.close()


def batches(
    rows: Rows,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    place: Callable[[Batch], Any] | None = None,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    threads: int = 2,
    buffer: int = 4,
) -> Batches[Any]:
    """Training batches [batch_size, ...], endless unless `stop` is given.

    Args:
        rows: random-access rows.
        batch_size: global batch, over all processes.
        start: first step; a resumed run passes the step it stopped at.
        stop: step to end before.
        place: called with each batch in a background thread (say, to copy it to the devices); its result is the batch.
        spans: parts [first, last) of the global batch that this process needs, ascending (`local_spans`); a batch then
            holds only those rows, concatenated. None builds all rows.
        threads: background threads.
        buffer: batches built ahead at most.
    """
    local_L = np.concatenate([np.arange(a, b) for a, b in spans]) if spans is not None else np.arange(batch_size)

    def build(step: int) -> Any:
        batch = rows.batch(step * batch_size + local_L)
        return batch if place is None else place(batch)

    return Batches(build, start, 2**62 // batch_size if stop is None else max(stop, start), threads, buffer)


def eval_batches(
    rows: Rows,
    batch_size: int,
    limit: int | None = None,
    place: Callable[[Batch], Any] | None = None,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    threads: int = 2,
    buffer: int = 4,
) -> Batches[Any]:
    """Every row of the first epoch exactly once, as batches of one shape; `limit` batches at most.

    Each batch has `row_weight` float32 [B], 1 for rows that count; the last batch is filled with copies of the last row
    whose `row_weight`, and `weights` where rows have them, are 0. Other arguments as in `batches`.
    """
    local_L = np.concatenate([np.arange(a, b) for a, b in spans]) if spans is not None else np.arange(batch_size)
    steps = -(-len(rows) // batch_size)

    def build(step: int) -> Any:
        index_B = step * batch_size + local_L
        batch = rows.batch(np.minimum(index_B, len(rows) - 1))
        batch["row_weight"] = (index_B < len(rows)).astype(np.float32)
        if "weights" in batch:
            batch["weights"] = batch["weights"] * batch["row_weight"][:, None]
        return batch if place is None else place(batch)

    return Batches(build, 0, steps if limit is None else min(limit, steps), threads, buffer)


def local_spans(sharding: Any, batch_size: int) -> list[tuple[int, int]]:
    """Parts [first, last) of the batch axis that this process's devices hold under a `jax.sharding.Sharding`.

    Batches built with these spans are what `jax.make_array_from_process_local_data` takes.
    """
    index = sharding.addressable_devices_indices_map((batch_size,)).values()
    found = sorted({s.indices(batch_size)[:2] for (s,) in index})
    merged: list[tuple[int, int]] = []
    for first, last in found:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
