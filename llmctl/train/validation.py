"""Compute validation metrics: exact means over all validation rows, independent of batch size and mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.data.device_batches import DeviceBatches, Rows
from llmctl.distributed import mesh as meshes
from llmctl.model import chunked_loss
from llmctl.model.losses import Loss
from llmctl.train import preemption

Further = Callable[[dict[str, Any], Callable[[], None]], dict[str, float]]
"""Function that computes further metrics, by name. Its arguments are the parameters and a function `check_stop`, which
raises StopRequested if the run has to stop.
"""


class Validation:
    """Compute metrics on validation rows: `validation(params)` returns {"loss", "accuracy", ...}.

    Each metric is a weighted mean over the rows. The computation is compiled once.

    The function `further`, if given, computes more metrics. Its arguments are the parameters and a function
    `check_stop`, which `further` must call often. `check_stop` raises `preemption.StopRequested` if the run has to
    stop.
    """

    def __init__(
        self,
        loss: Loss,
        rows: Rows,
        batch_size: int,
        batches: int,
        mesh: jax.sharding.Mesh,
        further: Further | None = None,
    ) -> None:
        self.rows, self.limit, self.mesh, self.further = rows, batches, mesh, further
        self.batches = DeviceBatches.for_one_pass(mesh, batch_size, len(rows))
        self._sums = jax.jit(lambda params, batch: loss(params, batch)[1])

    def __call__(self, params: dict[str, Any]) -> dict[str, float]:
        """Return the metrics of the parameters, by name, on at most the first `batches` batches of the rows.

        Raises:
          preemption.StopRequested: If a process of the run received a signal to stop.
        """
        total: Any = None
        with meshes.use(self.mesh), self.batches.once(self.rows, self.limit) as steps:
            for _, batch in steps:
                preemption.raise_if_requested()
                sums = self._sums(params, batch)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        found = {name: float(value) for name, value in chunked_loss.means(total).items()}
        return found | (self.further(params, preemption.raise_if_requested) if self.further else {})
