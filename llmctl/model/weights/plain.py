"""Treat a plain array as a weight: `as_node` gives every leaf of a parameter tree the methods of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.model import embedding_lookup, fsdp_matmul, quantized_matmul
from llmctl.model.weights.base import Node, Product, take_along


@dataclass(frozen=True)
class Plain(Node):
    """A view of an array (or its abstract shape); parameter trees hold the array itself."""

    kind: ClassVar[str] = ""

    array: Any

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    values_part = property(lambda self: "")

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """See Node."""
        return self.array.astype(dtype)

    def matmul(self, x: jax.Array, dtype: Any, how: Product) -> jax.Array:
        """See Node. Gathered once a pass if the mesh splits it over devices that see different tokens."""
        if how.axes and not how.kind and fsdp_matmul.splits(how.axes):
            return cast(jax.Array, fsdp_matmul.matmul(x, self.array, how.axes, dtype))
        return super().matmul(x, dtype, how)

    def multiply(self, x_NI: jax.Array, dtype: Any, how: Product) -> jax.Array:
        """See Node; in 8 bits if training asks for it."""
        w_IO = self.array.astype(dtype)
        if how.kind:
            return cast(jax.Array, quantized_matmul.matmul(x_NI, w_IO, how.kind))
        return jnp.matmul(x_NI, w_IO)

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """See Node; with `axes`, devices that share the table trade rows instead of gathering it if that sends less."""
        if axes:
            return embedding_lookup.take(self.array, ids, axes[0], dtype)
        return jnp.take(self.array, ids, axis=0).astype(dtype)

    def parts(self) -> dict[str, Any]:
        """See Node; the array is its own only part, without a name."""
        return {"": self.array}

    def masked(self, mask: jax.Array) -> jax.Array:
        """See Node."""
        return jnp.where(mask, self.array, jnp.zeros((), self.array.dtype))

    def select(self, index_LN: np.ndarray, axis: int) -> jax.Array:
        """See Node."""
        return take_along(self.array, index_LN, axis, self.shape[axis])

    def bare(self) -> Any:
        """See Node."""
        return self.array

    def merged(self) -> Any:
        """See Node."""
        return self.array

    def for_decoding(self, on_cpu: bool) -> Any:
        """See Node."""
        return self.array


def as_node(w: Any) -> Node:
    """Return the weight's methods: a node itself, a plain array in a `Plain`."""
    return w if isinstance(w, Node) else Plain(w)


def is_plain(w: Any) -> bool:
    """True for a weight that is one array."""
    return not isinstance(w, Node)
