"""Train factors that multiply keys, values, and inner activations of feed-forward layers.

The method is called (IA)^3 (Liu et al., 2022, arXiv:2205.05638). The matrices of the model may be quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.adapters import targets
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    import jax

    from llmctl.model import weights
    from llmctl.model.config import ModelConfig

SIDES = {"k": "outputs", "v": "outputs", "down": "inputs"}
"""Map from the name of a matrix to the activations that its factors multiply: outputs or inputs of the matrix."""


class Ia3(Method):
    """Train factors that multiply activations, and the task's head."""

    name = "ia3"
    settings = ("merge",)
    adapts = True
    fills_zeros = False

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with factors around the matrices k, v and down, sharded over `mesh`.

        The factors are initialized to one, so the model's outputs do not change.
        """
        import jax.numpy as jnp

        from llmctl.model import weights

        def scaled(m: weights.Matrix, number: int) -> weights.Scaled:
            *lead, inputs, outputs = m.weight.shape
            side = SIDES[m.name]
            shape = (inputs, 1) if side == "inputs" else (1, outputs)
            return weights.Scaled(m.weight, jnp.ones((*lead, *shape)), side)

        return targets.wrap(model, params, [*SIDES], scaled, mesh, "method")


METHOD = Ia3()
