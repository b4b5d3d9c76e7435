"""The way of a batch onto the devices: each process builds the rows that its devices hold, and no others."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from llmctl import hosts, sequence
from llmctl import mesh as meshes
from llmctl.data import pipeline


class Feed:
    """Batches of `size` rows over `mesh`: `spans` for `llmctl.data.pipeline` to build, `place` for what it built."""

    def __init__(self, mesh: jax.sharding.Mesh, size: int) -> None:
        self.mesh, self.size = mesh, size
        self.spans = pipeline.local_spans(meshes.batch_sharding(mesh, 1), size) if hosts.count() > 1 else None
        """Parts [first, last) of a batch that this process needs; None is all of it."""

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The rows of `spans` -> the whole batch on the devices of all processes."""
        spans = self.spans
        if spans is None:
            return meshes.place(batch, self.mesh)
        batch = sequence.balanced(batch, self.mesh.shape["context"])
        shardings = meshes.batch_shardings(batch, self.mesh)
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
