"""Multiply the inputs or the outputs of a weight by trained factors ((IA)^3; Liu et al., 2022, arXiv:2205.05638).

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llmctl.model.weights.adapter import Adapter
from llmctl.model.weights.base import Product, node_type, setting
from llmctl.model.weights.tree import as_node


@node_type
class Scaled(Adapter):
    """base * factor; factor [..., 1, O] of the outputs, bias included, or [..., I, 1] of the inputs."""

    kind: ClassVar[str] = "scaled"
    adapter_parts: ClassVar[tuple[str, ...]] = ("factor",)
    keeps_zeros: ClassVar[bool] = True

    factor: jax.Array
    side: str = setting()
    """`inputs` or `outputs`."""

    scales_bias = property(lambda self: self.side == "outputs")

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """See Node."""
        return (as_node(self.base).dense() * self.factor.astype(jnp.float32)).astype(dtype)

    def matmul(self, x: jax.Array, dtype: Any, how: Product) -> jax.Array:
        """See Node; the activations are scaled and not the weight."""
        base, plain = as_node(self.base), Product(fold=how.fold)
        factor = self.factor.astype(dtype).reshape(-1)
        if self.side == "inputs":
            return base.matmul(x.astype(dtype) * factor, dtype, plain)
        return base.matmul(x, dtype, plain) * factor

    def bias(self, b: jax.Array, dtype: Any) -> jax.Array:
        """See Node."""
        return b.astype(dtype) * self.factor.astype(dtype)[..., 0, :] if self.scales_bias else b.astype(dtype)

    def for_decoding(self, on_cpu: bool) -> Any:
        """See Node; the factor stays apart, because it also scales the bias."""
        return replace(self, base=as_node(self.base).for_decoding(on_cpu))
