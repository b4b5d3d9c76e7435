"""Metrics of parameters on held-out rows: exact means over every row, whatever the batch size and the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.data.device_batches import DeviceBatches, Rows
from llmctl.distributed import mesh as meshes
from llmctl.model import chunked_loss
from llmctl.model.losses import Loss
from llmctl.train import preemption


class Validation:
    """`validation(params)` -> {"loss", "accuracy", ...}, each the mean by weight over the rows. Compiles once."""

    def __init__(self, loss: Loss, rows: Rows, batch_size: int, batches: int, mesh: jax.sharding.Mesh) -> None:
        self.rows, self.limit, self.mesh = rows, batches, mesh
        self.batches = DeviceBatches.covering(mesh, batch_size, len(rows))
        self._sums = jax.jit(lambda params, batch: loss(params, batch)[1])

    def __call__(self, params: dict[str, Any]) -> dict[str, float]:
        """One pass over the rows, `batches` batches at most.

        Raises stopping.Asked in the middle of it where a run is asked for an end.
        """
        total: Any = None
        with meshes.use(self.mesh), self.batches.once(self.rows, self.limit) as steps:
            for _, batch in steps:
                preemption.heed()
                sums = self._sums(params, batch)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return {name: float(value) for name, value in chunked_loss.means(total).items()}
