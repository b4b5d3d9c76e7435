"""Define (IA)^3, an adapter that multiplies the inputs or the outputs of a frozen weight by trained factors (Liu et
al., 2022, arXiv:2205.05638).

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
    """Store a weight as base * factor. The factor is [..., 1, O] for outputs or [..., I, 1] for inputs.

    A factor of outputs also multiplies the layer's bias.
    """

    kind: ClassVar[str] = "scaled"
    adapter_parts: ClassVar[tuple[str, ...]] = ("factor",)
    keeps_zeros: ClassVar[bool] = True

    factor: jax.Array
    side: str = setting()
    """Whether the factor multiplies `inputs` or `outputs`."""

    scales_bias = property(lambda self: self.side == "outputs")

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        return (as_node(self.base).dense() * self.factor.astype(jnp.float32)).astype(dtype)

    def matmul(self, x: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x @ weight, [..., O], in `dtype`.

        The factor is applied to activations, not to the weight.
        """
        base, plain = as_node(self.base), Product(fold=options.fold)
        factor = self.factor.astype(dtype).reshape(-1)
        if self.side == "inputs":
            return base.matmul(x.astype(dtype) * factor, dtype, plain)
        return base.matmul(x, dtype, plain) * factor

    def bias(self, b: jax.Array, dtype: Any) -> jax.Array:
        """Return the bias in `dtype`, multiplied by the factor if the factor scales outputs."""
        return b.astype(dtype) * self.factor.astype(dtype)[..., 0, :] if self.scales_bias else b.astype(dtype)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return this weight with its frozen base converted to the form that is fastest for decoding.

        The factor is not merged, because it may also scale the bias.
        """
        return replace(self, base=as_node(self.base).for_decoding(on_cpu))
