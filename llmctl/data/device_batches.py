"""Build batches of rows and copy them to the devices, in background threads ahead of the training step.

Step k uses rows [k * B, (k + 1) * B). A checkpoint of the data therefore only needs the number of the next step. A
resumed run reads the same global batches, on any number of processes. Each process builds only the rows of its own
devices.

    batches = DeviceBatches(mesh, 32)
    with batches.training(rows, start=100, stop=200) as steps:
        for step, batch in steps:
            state, metrics = train_step(state, batch)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmctl.data.pretraining.packing import Batch
from llmctl.distributed import context_parallel, host_arrays, processes
from llmctl.distributed import mesh as meshes

T = TypeVar("T")


class Rows(Protocol):
    """Define the interface of training or evaluation rows with random access. A row is one sequence with its
    targets."""

    def __len__(self) -> int: ...

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `rows_B` as arrays [B, ...], by name."""
        ...


def row_shapes(rows: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of the first row, by name."""
    return {name: a.shape for name, a in rows[0].items()}


class Prefetch(Iterator[tuple[int, T]], Generic[T]):
    """Iterate over pairs (step, batch), and build the next batches in background threads.

    The iterator must be closed, or used as a context manager. If building a batch fails, `next` raises the error
    in place of this batch.
    """

    def __init__(self, build: Callable[[int], T], start: int, stop: int, threads: int, buffer: int):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        steps = grain.MapDataset.source(_Steps(build, stop)).to_iter_dataset(options)
        self._iterator = iter(steps)
        self._step = start
        self._iterator.set_state({"next_index": start})
        self.wait_seconds = 0.0
        """Total time spent in `next`, in seconds: the time that training waited for input."""

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
        """Stop the threads and discard unfinished batches. Repeated calls have no effect."""
        self._iterator.close()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_iterator"):
            self.close()


class _Steps(Generic[T]):
    """Give random access to batches by step number, so that several threads of Grain can build batches at once."""

    def __init__(self, build: Callable[[int], T], steps: int):
        self._build, self._steps = build, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> T:
        return self._build(int(index))


def prefetch(
    rows: Rows,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    place: Callable[[Batch], Any] | None = None,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    once: bool = False,
    threads: int = 2,
    buffer: int = 4,
) -> Prefetch[Any]:
    """Iterate over batches [batch_size, ...], which background threads build ahead. If `stop` is None, there is no last
    batch.

    Args:
        rows: Random-access rows.
        batch_size: Rows per global batch, over all processes.
        start: First step. A resumed run passes the step after its last step.
        stop: Step before which the iteration ends.
        place: Function that background threads apply to each batch, such as a copy to the devices. The function's
            result replaces the batch.
        spans: Row ranges [first, last) of the global batch that this process builds, ascending (see `local_spans`). A
            batch then contains only these rows, concatenated. None builds all rows.
        once: Whether to read every row of the first epoch exactly once. The last batch is filled with copies of the
            last row. Batches then also have the array `row_weight`, float32 [B]: 0 for these copies, 1 for all other
            rows. The array `weights` is 0 for the copies too.
        threads: Number of background threads.
        buffer: Maximum number of batches to build ahead.
    """
    local_L = np.concatenate([np.arange(a, b) for a, b in spans]) if spans is not None else np.arange(batch_size)

    def build(step: int) -> Any:
        index_B = step * batch_size + local_L
        batch = _with_row_weights(rows, index_B) if once else rows.batch(index_B)
        return batch if place is None else place(batch)

    end = -(-len(rows) // batch_size) if once else 2**62 // batch_size
    if stop is not None:
        end = min(end, max(stop, start))
    return Prefetch(build, start, end, threads, buffer)


def _with_row_weights(rows: Rows, index_B: np.ndarray) -> Batch:
    """Return the batch of rows `index_B` of the first epoch, with the additional array `row_weight`, float32 [B].

    If an index is beyond the epoch, the batch contains a copy of the last row. `row_weight` is 0 for copies, and 1 for
    all other rows. The array `weights` is 0 for copies too.
    """
    batch = rows.batch(np.minimum(index_B, len(rows) - 1))
    batch["row_weight"] = (index_B < len(rows)).astype(np.float32)
    if "weights" in batch:
        batch["weights"] = batch["weights"] * batch["row_weight"][:, None]
    return batch


class DeviceBatches:
    """Build batches of `size` rows, sharded over `mesh`.

    If the mesh axis `context` shards sequences, the tokens of each row are permuted. Attention then takes equally long
    on every device. If `reading_order` is true, tokens keep their text order and only rows are sharded. Such batches
    are replicated if they cannot be divided evenly over the devices.
    """

    def __init__(self, mesh: Mesh, size: int, reading_order: bool = False) -> None:
        self.mesh, self.size, self.reading_order = mesh, size, reading_order
        self.spans = local_spans(self.row_sharding(1), size) if processes.count() > 1 else None
        """Row ranges [first, last) of a batch that this process builds; None builds all rows."""

    @classmethod
    def for_one_pass(cls, mesh: Mesh, size: int, rows: int) -> DeviceBatches:
        """Return an object that builds batches for one pass over `rows` rows.

        The batch size is min(`size`, `rows`), rounded up to a multiple of the number of devices that shard the rows.
        """
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        return cls(mesh, -(-min(size, rows) // ways) * ways)

    def training(self, rows: Rows, start: int, stop: int, place: Callable[[Batch], Any] | None = None) -> Prefetch[Any]:
        """Iterate over the batches of the steps [start, stop). The function `place`, by default `self.place`, copies
        each batch to the devices.
        """
        return prefetch(rows, self.size, start, stop, place or self.place, spans=self.spans)

    def once(self, rows: Rows, limit: int | None = None, place: Callable[[Batch], Any] | None = None) -> Prefetch[Any]:
        """Iterate over batches that contain every row once. If `limit` is given, stop after that number of batches.

        The last batch is filled with copies of the last row. The array `row_weight` is 0 for these copies (see
        `prefetch`).
        """
        return prefetch(rows, self.size, stop=limit, place=place or self.place, spans=self.spans, once=True)

    def abstract(self, row: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes, dtypes and shardings of a batch whose rows have the shapes of `row`.

        The devices of the mesh need not exist.
        """
        batch = {name: np.asarray(a)[None] for name, a in row.items()}
        if not self.reading_order:
            batch = context_parallel.to_zigzag(batch, self.mesh.shape["context"])
        shardings, types = self.shardings(batch), jax.dtypes.canonicalize_dtype
        return {
            name: jax.ShapeDtypeStruct((self.size, *a.shape[1:]), types(a.dtype), sharding=shardings[name])
            for name, a in batch.items()
        }

    def row_sharding(self, ndim: int) -> NamedSharding:
        """Return the sharding of a batch array [B, ...] with `ndim` axes, of which only the first is sharded."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        replicated = self.reading_order and self.size % ways != 0
        return meshes.replicated(self.mesh) if replicated else meshes.batch_sharding(self.mesh, ndim)

    def shardings(self, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """Return the sharding of each array in a batch: over rows and, if the mesh shards sequences, over tokens."""
        if self.reading_order or self.mesh.shape["context"] == 1:
            return {name: self.row_sharding(a.ndim) for name, a in batch.items()}
        along = {name: a.ndim > 1 and context_parallel.has_sequence_axis(name) for name, a in batch.items()}
        return {
            name: meshes.sharding(["batch", "seq"] + [None] * (a.ndim - 2), self.mesh)
            if along[name]
            else self.row_sharding(a.ndim)
            for name, a in batch.items()
        }

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Copy a batch to the devices of all processes. Each process passes only the rows that its own devices hold
        (`spans`)."""
        if not self.reading_order and self.mesh.shape["context"] > 1:
            batch = context_parallel.to_zigzag(batch, self.mesh.shape["context"])
        shardings = self.shardings(batch)
        if self.spans is None:
            return jax.device_put(batch, shardings)
        return {name: self._global_array(a, shardings[name], self.spans) for name, a in batch.items()}

    def _global_array(self, rows: np.ndarray, sharding: NamedSharding, spans: Sequence[tuple[int, int]]) -> jax.Array:
        """Return a global array. Each process provides the rows of its own devices.

        Args:
            rows: Rows of this process, concatenated.
            sharding: Sharding of the global array.
            spans: Ranges [first, last) of these rows in the global array.
        """
        begins = np.cumsum([0, *(last - first for first, last in spans)])

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(self.size)
            at = next(i for i, (a, b) in enumerate(spans) if a <= first and last <= b)
            start = begins[at] + first - spans[at][0]
            return rows[(slice(start, start + last - first), *index[1:])]

        return jax.make_array_from_callback((self.size, *rows.shape[1:]), sharding, part)

    def gather(self, batch: dict[str, np.ndarray], placed: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """Return the global batch, with the rows of all processes, as host arrays in every process.

        Args:
            batch: Rows of this process in text order.
            placed: Device arrays that `place` returned for `batch`.
        """
        return batch if self.spans is None else {name: host_arrays.read(a) for name, a in placed.items()}


def place(batch: Mapping[str, Any], mesh: Mesh, *, reading_order: bool = False) -> dict[str, jax.Array]:
    """Copy a host batch to the devices. The batch must be equal in every process.

    If `reading_order` is true, tokens keep their text order and only rows are sharded (see `DeviceBatches`).
    """
    found = {name: np.asarray(a) for name, a in batch.items()}
    layout = DeviceBatches(mesh, len(next(iter(found.values()))), reading_order)
    if not reading_order:
        found = context_parallel.to_zigzag(found, mesh.shape["context"])
    return {name: host_arrays.put(found[name], s) for name, s in layout.shardings(found).items()}


def local_spans(sharding: Any, batch_size: int) -> list[tuple[int, int]]:
    """Return the row ranges [first, last) of a batch that a sharding assigns to the devices of this process."""
    index = sharding.addressable_devices_indices_map((batch_size,)).values()
    found = sorted({s.indices(batch_size)[:2] for (s,) in index})
    merged: list[tuple[int, int]] = []
    for first, last in found:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
