"""Store a weight together with learned scales for rounding the weight to integers (LSQ).

The weight stays a float. Every product reads the rounded weight, integer * scale. The stage `quantize` converts the
weight to these integers, without changing the rounded values.

In training, the gradients of the weight and of the scale are computed as in LSQ (Esser et al., 2020, arXiv:1902.08153).

Shapes: I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llmctl.model.weights.base import Node, node_type, setting


def limits(bits: int) -> tuple[float, float]:
    """Return the lowest and the highest integer of formats that have `bits` bits and no zero points.

    >>> limits(4), limits(2)
    ((-7.0, 7.0), (-2.0, 1.0))
    """
    top = 2.0 ** (bits - 1) - 1
    return -top - (bits < 4), top


@node_type
class LearnedScale(Node):
    """Store a matrix or a table of floats, with one learned scale per group.

    The scales of a matrix [..., I, O] are [..., G, O]. The scales of a table [V, D] are [V, G], for G groups of each
    row.

    >>> w = LearnedScale(jnp.array([[0.9], [-0.2], [40.0]]), jnp.full((1, 1), 0.5), "int4")
    >>> w.dense()[:, 0].tolist()
    [1.0, -0.0, 3.5]
    """

    kind: ClassVar[str] = "learned_scale"
    scale_parts: ClassVar[tuple[str, ...]] = ("scale",)

    weight: jax.Array
    """Weight before rounding."""
    scale: jax.Array
    format: str = setting()
    """Name of the format: int8, int4, int3 or int2."""

    shape = property(lambda self: self.weight.shape)
    dtype = property(lambda self: self.weight.dtype)
    is_integer = property(lambda self: True)
    format_name = property(lambda self: f"learned-scale {self.format}")
    bits = property(lambda self: int(self.format.removeprefix("int")))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the rounded weight as one dense array, in `dtype`."""
        return jnp.asarray(rounded(self.weight, self.scale, limits(self.bits)), dtype)

    def level(self) -> jax.Array:
        """Return the integers to which the weight is rounded, in the dtype of the weight."""
        return jnp.clip(jnp.round(self.weight / spread(self.scale, self.weight)), *limits(self.bits))

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of this table, [..., D], in `dtype`. Only these rows are rounded."""
        weight, scale = (jnp.take(a, ids.reshape(-1), axis=0) for a in (self.weight, self.scale))
        return jnp.asarray(rounded(weight, scale, limits(self.bits)), dtype).reshape(*ids.shape, -1)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return the rounded weight as a plain array, so that the weight is not rounded again for every token."""
        return self.dense(self.dtype)

    def masked(self, mask: jax.Array) -> LearnedScale:
        """Return the weight with zeros at the False entries of the mask. The scales are unchanged."""
        return replace(self, weight=jnp.where(mask, self.weight, 0))


def spread(scale: jax.Array, w: jax.Array) -> jax.Array:
    """Return the scale of each element of `w`, by repeating the scale of its group."""
    for axis, (size, groups) in enumerate(zip(w.shape, scale.shape, strict=True)):
        scale = jnp.repeat(scale, size // groups, axis=axis) if size != groups else scale
    return scale


def sums_of_groups(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum an array of the weight's shape over the elements that share a scale. The result has the scales' `shape`."""
    for axis, groups in enumerate(shape):
        if a.shape[axis] != groups:
            a = a.reshape(*a.shape[:axis], groups, -1, *a.shape[axis + 1 :]).sum(axis=axis + 1)
    return a


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded(w: jax.Array, scale: jax.Array, bounds: tuple[float, float]) -> jax.Array:
    """Return the rounded weight, integer * scale, with integers within `bounds`. LSQ defines the gradients."""
    scale = spread(scale, w)
    return jnp.clip(jnp.round(w / scale), *bounds) * scale


def _forward(w: jax.Array, scale: jax.Array, bounds: tuple[float, float]) -> tuple[jax.Array, Any]:
    return rounded(w, scale, bounds), (w, scale)


def _backward(bounds: tuple[float, float], saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the weight and of the scale.

    The gradient of an element is the gradient of the rounded element; 0 if the element is clipped. The gradient of a
    scale is divided by sqrt(elements per scale * highest integer), as in the paper.
    """
    (w, scale), (low, high) = saved, bounds
    unit = w / spread(scale, w)
    inside = (unit > low) & (unit < high)
    slope = jnp.where(inside, jnp.round(unit) - unit, jnp.clip(unit, low, high))
    per_scale = w.size // scale.size
    return jnp.where(inside, gradient, 0), sums_of_groups(gradient * slope, scale.shape) * (per_scale * high) ** -0.5


rounded.defvjp(_forward, _backward)
