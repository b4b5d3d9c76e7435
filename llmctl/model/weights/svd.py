"""Define AdaLoRA: a weight with an update in the form of a singular value decomposition (arXiv:2303.10512).

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llmctl.model.weights.adapter import Adapter
from llmctl.model.weights.base import Product, node_type, setting
from llmctl.model.weights.low_rank import LowRank


@node_type
class Svd(Adapter):
    """Store a weight as base + scale * a @ diag(e) @ b, with singular values `e`.

    The shapes are `a` [..., I, R], `e` [..., 1, R] and `b` [..., R, O].
    """

    kind: ClassVar[str] = "svd"
    adapter_parts: ClassVar[tuple[str, ...]] = ("a", "b", "e")

    a: jax.Array
    b: jax.Array
    e: jax.Array
    scale: float = setting()

    def as_low_rank(self) -> LowRank:
        """Return the weight as a `LowRank` object, base + scale * (a * e) @ b."""
        return LowRank(self.base, self.a * self.e, self.b, self.scale)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        return self.as_low_rank().dense(dtype)

    def matmul(self, x: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x @ weight, [..., O], in `dtype`. The product a @ diag(e) @ b is not computed."""
        return self.as_low_rank().matmul(x, dtype, options)

    def truncated(self) -> Any:
        """Return the weight as a `LowRank` object that keeps only the nonzero singular values.

        If all singular values are zero, return the frozen base weight. All layers get the same rank, the largest number
        of nonzero singular values in any layer. Layers with fewer nonzero values are padded with zeros. The rank is
        computed on the host.
        """
        import numpy as np

        used = np.asarray(jax.device_get(self.e)) != 0  # [..., 1, R]
        rank = int(used.sum(axis=-1).max())
        if not rank:
            return self.base
        order = np.argsort(~used, axis=-1, kind="stable")[..., :rank]  # the used ones, in their order
        valid = jnp.asarray(np.take_along_axis(used, order, axis=-1))
        columns, rows = jnp.asarray(order), jnp.asarray(np.swapaxes(order, -1, -2))
        a = jnp.where(valid, jnp.take_along_axis(self.a * self.e, columns, axis=-1), 0)
        b = jnp.where(jnp.swapaxes(valid, -1, -2), jnp.take_along_axis(self.b, rows, axis=-2), 0)
        return LowRank(self.base, a, b, self.scale)


def orthogonality(w: Svd) -> jax.Array:
    """Return the orthogonality loss: the sum over layers of ||a^T a - I|| + ||b b^T - I|| (Frobenius norms)."""
    one = jnp.eye(w.a.shape[-1])

    def norm(gram: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sqrt(jnp.sum(jnp.square(gram - one), axis=(-2, -1)) + 1e-30))

    return norm(jnp.swapaxes(w.a, -1, -2) @ w.a) + norm(w.b @ jnp.swapaxes(w.b, -1, -2))
