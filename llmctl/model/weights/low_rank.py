"""Define LoRA: a frozen weight, the base, with a trained low-rank update (arXiv:2106.09685).

The base may be quantized (QLoRA, arXiv:2305.14314).

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llmctl.model.weights.adapter import Adapter
from llmctl.model.weights.base import Product, node_type, setting
from llmctl.model.weights.tree import as_node


@node_type
class LowRank(Adapter):
    """Store a weight as base + scale * a @ b. The shapes are `a` [..., I, R] and `b` [..., R, O]."""

    kind: ClassVar[str] = "low_rank"
    adapter_parts: ClassVar[tuple[str, ...]] = ("a", "b")

    a: jax.Array
    b: jax.Array
    scale: float = setting()

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        delta = self.scale * jnp.matmul(self.a.astype(jnp.float32), self.b.astype(jnp.float32))
        return (as_node(self.base).dense() + delta).astype(dtype)

    def matmul(self, x: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x @ weight, [..., O], in `dtype`. The product a @ b is not computed."""
        x, plain = x.astype(dtype), Product(fold=options.fold)
        low = as_node(self.b).matmul(as_node(self.a).matmul(x, dtype, plain), dtype, plain)
        return as_node(self.base).matmul(x, dtype, plain) + jnp.asarray(self.scale, dtype) * low

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of this table, [..., D], in `dtype`."""
        rows = as_node(self.base).take(ids, dtype, axes)
        return rows + self.scale * jnp.matmul(as_node(self.a).take(ids, dtype), self.b.astype(dtype))
