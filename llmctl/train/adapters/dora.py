"""Train each matrix as a magnitude times a direction (DoRA; Liu et al., 2024, arXiv:2402.09353).

A low-rank adapter changes the direction. The matrices of the model may be quantized. Ranks, scales, targets and
initialization are the same as in LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.adapters.lora import Lora, attach
from llmctl.train.adapters.method import Params

if TYPE_CHECKING:
    import jax

    from llmctl.model.config import ModelConfig


class Dora(Lora):
    """Train low-rank adapters, the magnitudes of the adapted matrices, and the task's head."""

    name = "dora"

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with a DoRA adapter around each matrix of `lora.targets`, sharded over `mesh`.

        The magnitudes are initialized to the norms of the matrices' columns, so the model's outputs do not change.
        """
        from llmctl.model import weights

        return attach(model, params, config.lora, key, mesh, weights.Dora.around)


METHOD = Dora()
