"""The way of a batch onto the devices: each process builds the rows that its devices hold, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from llmctl.data import prefetch
from llmctl.distributed import context_parallel, host_arrays, processes
from llmctl.distributed import mesh as meshes


class Feed:
    """Batches of `size` rows over `mesh`: `spans` for `llmctl.data.prefetch` to build, `place` for what it built.

    Where devices share sequences rows are put in balanced order, unless `reading_order` leaves them as they are, split
    by rows alone (on every device whole, where the rows do not divide).
    """

    def __init__(self, mesh: jax.sharding.Mesh, size: int, reading_order: bool = False) -> None:
        self.mesh, self.size, self.reading_order = mesh, size, reading_order
        self.spans = prefetch.local_spans(self.lies(1), size) if processes.count() > 1 else None
        """Parts [first, last) of a batch that this process needs; None is all of it."""

    def lies(self, ndim: int) -> NamedSharding:
        """How an array of rows [B, ...] lies in reading order."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        whole = self.reading_order and self.size % ways != 0
        return meshes.replicated(self.mesh) if whole else meshes.batch_sharding(self.mesh, ndim)

    def abstract(self, row: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes, types and shardings of a batch on the devices.

        Args:
          row: one row, arrays without the leading [B].
        """
        batch = {name: np.asarray(a)[None] for name, a in row.items()}
        if self.reading_order:
            shardings = {name: self.lies(a.ndim) for name, a in batch.items()}
        else:
            batch = context_parallel.balanced(batch, self.mesh.shape["context"])
            shardings = meshes.batch_shardings(batch, self.mesh)
        types = {name: jax.dtypes.canonicalize_dtype(a.dtype) for name, a in batch.items()}
        return {
            name: jax.ShapeDtypeStruct((self.size, *a.shape[1:]), types[name], sharding=shardings[name])
            for name, a in batch.items()
        }

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The rows of `spans` -> the whole batch on the devices of all processes."""
        spans = self.spans
        if self.reading_order:
            shardings = {name: self.lies(a.ndim) for name, a in batch.items()}
        elif spans is None:
            return meshes.place(batch, self.mesh)
        else:
            batch = context_parallel.balanced(batch, self.mesh.shape["context"])
            shardings = meshes.batch_shardings(batch, self.mesh)
        if spans is None:
            return jax.device_put(batch, shardings)
        begins = np.cumsum([0, *(last - first for first, last in spans)])

        def held(index: Any, rows: np.ndarray) -> np.ndarray:
            first, last, _ = index[0].indices(self.size)
            at = next(i for i, (a, b) in enumerate(spans) if a <= first and last <= b)
            start = begins[at] + first - spans[at][0]
            return rows[(slice(start, start + last - first), *index[1:])]

        return {
            name: jax.make_array_from_callback(
                (self.size, *a.shape[1:]), shardings[name], lambda index, a=a: held(index, a)
            )
            for name, a in batch.items()
        }

    def whole(self, batch: dict[str, np.ndarray], placed: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """The rows of all processes on the host of each, of a `batch` in reading order and how it was `placed`."""
        return batch if self.spans is None else {name: host_arrays.read(a) for name, a in placed.items()}
