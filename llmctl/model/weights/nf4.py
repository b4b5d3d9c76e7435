"""Store a weight in NF4: 4-bit codes of 16 quantiles of the normal distribution, with one scale per block of inputs
(QLoRA; Dettmers et al., 2023, arXiv:2305.14314).

A value is LEVELS[code] * scale. The scale of a block is the largest absolute value in the block. Levels and codes are
the same as in the library bitsandbytes. The scales stay in float32; the paper's second quantization of the scales is
not applied.

Shapes: I inputs, O outputs, G blocks of inputs, V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.model.weights.base import Node, node_type

LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""Values of the 16 codes, in ascending order (appendix E of the paper)."""
BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2
"""Midpoints between neighboring levels, float32 [15]. A value equal to a midpoint gets the lower code."""
OFFSET = 8
"""Difference between a code (0 to 15) and the int4 that stores the code (-8 to 7)."""
ZERO = 7 - OFFSET
"""Int4 number that stores the value 0."""


@node_type
class NormalFloat(Node):
    """Store a matrix [..., I, O] as codes [..., I, O] and scales [..., G, O], or a table [V, D] with scales [V, G]."""

    kind: ClassVar[str] = "nf4"
    scale_parts: ClassVar[tuple[str, ...]] = ("scale",)

    codes: jax.Array
    """Codes minus OFFSET, int4."""
    scale: jax.Array
    """Largest absolute value of each block, float32."""

    shape = property(lambda self: self.codes.shape)
    dtype = property(lambda self: self.scale.dtype)
    is_integer = property(lambda self: True)

    @classmethod
    def of(cls, w: jax.Array, axis: int, block: int) -> NormalFloat:
        """Return a weight in NF4, with one scale per `block` elements along `axis`.

        >>> node = NormalFloat.of(jnp.array([[2.0], [-0.1], [0.0], [1.1]]), axis=0, block=2)
        >>> (node.codes.astype(int) + OFFSET)[:, 0].tolist(), node.scale[:, 0].tolist(), node.dense()[2:, 0].tolist()
        ([15, 6, 7, 15], [2.0, 1.100000023841858], [0.0, 1.100000023841858])
        """
        axis %= w.ndim
        shape = w.shape
        blocks = w.astype(jnp.float32).reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])
        scale = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
        unit = blocks * (1 / jnp.where(scale == 0, 1.0, scale))
        return cls(jnp.reshape(codes(unit), shape), jnp.squeeze(scale, axis + 1))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        return _values(self.codes, self.scale, dtype)

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of this table, [..., D], in `dtype`. Only these rows are dequantized."""
        return _values(jnp.take(self.codes, ids, axis=0), jnp.take(self.scale, ids, axis=0), dtype)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return a plain array on CPUs, because a CPU would convert the codes again for every token."""
        return self.dense() if on_cpu else self

    def masked(self, mask: jax.Array) -> NormalFloat:
        """Return the weight with zeros at the False entries of the mask. Other codes, and all scales, are unchanged."""
        return replace(self, codes=jnp.where(mask, self.codes, jnp.array(ZERO, jnp.int4)))


def codes(unit: jax.Array) -> jax.Array:
    """Return the stored code of the level nearest to each element, int4. Elements are weights divided by scales."""
    above = jnp.zeros(unit.shape, jnp.int8)
    for bound in BOUNDS:
        above += unit > bound
    return (above - OFFSET).astype(jnp.int4)


def levels(codes: jax.Array) -> jax.Array:
    """Return the level of each stored code, float32.

    Each level is selected from LEVELS by the four bits of its code, one after the other. XLA vectorizes such
    selections, but not a lookup by index.
    """
    bits = codes.astype(jnp.int32) + OFFSET
    level: list[Any] = [jnp.float32(value) for value in LEVELS]
    for bit in range(4):
        is_set = (bits >> bit) & 1 == 1
        level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _values(codes: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Return LEVELS[code] * scale for all codes. Each scale belongs to a block of codes along one axis."""
    for axis, (size, blocks) in enumerate(zip(codes.shape, scale.shape, strict=True)):
        scale = jnp.repeat(scale, size // blocks, axis=axis) if size != blocks else scale
    return (levels(codes) * scale.astype(jnp.float32)).astype(dtype)
