"""Define DoRA, which splits a weight into magnitude and direction, and trains a low-rank update of the direction (Liu
et al., 2024, arXiv:2402.09353).

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from llmctl.model.weights.adapter import Adapter
from llmctl.model.weights.base import Product, node_type
from llmctl.model.weights.low_rank import LowRank
from llmctl.model.weights.tree import as_node


@node_type
class Dora(LowRank):
    """Store a weight as magnitude * V / ||V||, with V = base + scale * a @ b. The base is the frozen weight.

    ||V|| is the norm of each column of V (an output). The backward pass treats this norm as a constant, as in section
    4.3 of the paper, which saves memory.
    """

    kind: ClassVar[str] = "dora"
    adapter_parts: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    magnitude: jax.Array  # [..., 1, O]

    @classmethod
    def around(cls, base: Any, a: jax.Array, b: jax.Array, scale: float) -> Self:
        """Return an adapter of `base` with the arrays `a` and `b`. If b is zero, the weight equals `base`."""
        return cls(base, a, b, scale, _norm(as_node(base).dense()))

    def factor(self) -> jax.Array:
        """Return magnitude / ||V||, float32 [..., 1, O]."""
        return self.magnitude.astype(jnp.float32) / jax.lax.stop_gradient(_norm(super().dense()))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        return (super().dense() * self.factor()).astype(dtype)

    def matmul(self, x: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x @ weight, [..., O], in `dtype`. The sum V is computed only for its norm."""
        return super().matmul(x, dtype, options) * self.factor()[..., 0, :].astype(dtype)

    take = Adapter.take


def _norm(w_IO: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(w_IO), axis=-2, keepdims=True))
