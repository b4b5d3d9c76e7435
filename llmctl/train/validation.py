"""Metrics of parameters on held-out rows: exact means over every row, whatever the batch size and the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.data import prefetch
from llmctl.data.device_batches import Feed
from llmctl.distributed import mesh as meshes
from llmctl.model import chunked_loss
from llmctl.model.losses import Loss
from llmctl.train import preemption


class Validation:
    """`validation(params)` -> {"loss", "accuracy", ...}, each the mean by weight over the rows. Compiles once."""

    def __init__(self, loss: Loss, rows: Any, batch_size: int, batches: int, mesh: jax.sharding.Mesh) -> None:
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows, self.limit, self.mesh = rows, batches, mesh
        self.batch_size = -(-min(batch_size, len(rows)) // ways) * ways
        self.feed = Feed(mesh, self.batch_size)
        self._sums = jax.jit(lambda params, batch: loss(params, batch)[1])

    def __call__(self, params: dict[str, Any]) -> dict[str, float]:
        """One pass over the rows, `batches` batches at most.

        Raises stopping.Asked in the middle of it where a run is asked for an end.
        """
        total: Any = None
        read = prefetch.eval_batches(self.rows, self.batch_size, self.limit, self.feed.place, spans=self.feed.spans)
        with meshes.use(self.mesh), read as batches:
            for _, batch in batches:
                preemption.heed()
                sums = self._sums(params, batch)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return {name: float(value) for name, value in chunked_loss.means(total).items()}
