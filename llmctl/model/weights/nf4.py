"""Store a weight in NF4: 4-bit codes of 16 quantiles of the normal distribution, with one scale per block of inputs
(QLoRA; Dettmers et al., 2023, arXiv:2305.14314).

A value is LEVELS[code] * scale. The scale of a block is the largest absolute value in the block. Levels and codes are
the same as in the library bitsandbytes.

Scales are stored in float32, or in 8 bits (double quantization, section 3 of the paper). The scale of a block is then
mean + SCALE_LEVELS[code] * max. The mean is over all scales of the matrix. Each group of 256 scales shares one max, the
largest absolute difference from the mean. The 256 scales belong to the same inputs and to neighboring outputs.

Shapes: I inputs, O outputs, G blocks of inputs, S groups of outputs whose scales share a max, V vocabulary, D model
width.
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
SCALES = 256
"""Number of scales that share one max, if scales are stored in 8 bits. The last group of a matrix may be smaller."""


def _scale_levels() -> np.ndarray:
    found = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


SCALE_LEVELS = _scale_levels()
"""Values of the 256 codes of scales, in ascending order: the signed dynamic map of bitsandbytes.

The interval from 0.1 to 1 has 64 values, the interval from 0.01 to 0.1 has 32, and so on. The negative values mirror
the positive ones, except for 1, which has no mirror image. The distance to the nearest value is at most 0.9 / 128.
"""
SCALE_BOUNDS = (SCALE_LEVELS[1:] + SCALE_LEVELS[:-1]) / 2
"""Midpoints between neighboring values of SCALE_LEVELS. A number equal to a midpoint gets the lower code."""


@node_type
class NormalFloat(Node):
    """Store a matrix or a table as 4-bit codes of the same shape, with one scale per block.

    The scales of a matrix [..., I, O] are [..., G, O]. The scales of a table [V, D] are [V, G], for G blocks of each
    row.

    >>> one = NormalFloat.of(jnp.ones((64, 4)), axis=0, block=64)
    >>> two = one.double_quantized()
    >>> {name: (part.shape, str(part.dtype)) for name, part in two.parts().items() if name != "codes"}
    {'scale': ((1, 4), 'uint8'), 'scale_max': ((1, 1), 'float32'), 'scale_mean': ((1, 1), 'float32')}
    """

    kind: ClassVar[str] = "nf4"
    scale_parts: ClassVar[tuple[str, ...]] = ("scale",)

    codes: jax.Array
    """Codes minus OFFSET, int4."""
    scale: jax.Array
    """Largest absolute value of each block, float32. If `scale_max` is not None, the code of this value, uint8."""
    scale_max: jax.Array | None = None
    """Largest absolute difference from `scale_mean` in each group of 256 scales, float32. The shape is [..., G, S], or
    [S, G] for a table. None if scales are not quantized."""
    scale_mean: jax.Array | None = None
    """Mean of the scales of each matrix, float32 [..., 1, 1]. None if scales are not quantized."""

    shape = property(lambda self: self.codes.shape)
    dtype = property(lambda self: (self.scale if self.scale_max is None else self.scale_max).dtype)
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

    def double_quantized(self) -> NormalFloat:
        """Return this matrix [..., I, O] with its scales in 8 bits. The codes of the elements do not change."""
        *lead, blocks, outputs = self.scale.shape
        mean = jnp.mean(self.scale, axis=(-2, -1), keepdims=True)
        rest = jnp.pad(self.scale - mean, [(0, 0)] * (len(lead) + 1) + [(0, -outputs % SCALES)])
        rest = rest.reshape(*lead, blocks, -1, SCALES)
        most = jnp.max(jnp.abs(rest), axis=-1, keepdims=True)
        found = jnp.searchsorted(SCALE_BOUNDS, rest / jnp.where(most == 0, 1.0, most)).astype(jnp.uint8)
        found = found.reshape(*lead, blocks, -1)[..., :outputs]
        return replace(self, scale=found, scale_max=jnp.squeeze(most, -1), scale_mean=mean)

    def scales(self) -> jax.Array:
        """Return the scale of each block as a float, in the shape of `scale`."""
        return _scales(self.scale, self.scale_max, self.scale_mean)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        return _values(self.codes, self.scales(), dtype)

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of this table, [..., D], in `dtype`. Only these rows are dequantized."""
        scale = jnp.take(self.scale, ids, axis=0)
        if self.scale_max is not None and self.scale_mean is not None:
            scale = _scales(scale, jnp.take(self.scale_max, ids // SCALES, axis=0), self.scale_mean[0, 0])
        return _values(jnp.take(self.codes, ids, axis=0), scale, dtype)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return a plain array if `on_cpu` is true, because a CPU would convert the codes again for every token.
        Otherwise, return this weight unchanged."""
        return self.dense() if on_cpu else self

    def masked(self, mask: jax.Array) -> NormalFloat:
        """Return the weight with zeros at the False entries of the mask. Other codes, and all scales, are unchanged."""
        return replace(self, codes=jnp.where(mask, self.codes, jnp.array(ZERO, jnp.int4)))

    def select(self, index_LN: np.ndarray, axis: int) -> Any:
        """Return a weight [layers, inputs, outputs] with only the selected inputs or outputs of each layer.

        If outputs are selected, 8-bit scales are converted to float32. The reason is that the selection would break up
        the groups of 256 scales. The values do not change.
        """
        if axis == -1 and self.scale_max is not None:
            return NormalFloat(self.codes, self.scales()).select(index_LN, axis)
        return super().select(index_LN, axis)

    def parts(self) -> dict[str, Any]:
        """Return the stored arrays of the weight, by name."""
        return {name: part for name, part in super().parts().items() if part is not None}

    def misfit(self) -> str:
        """Return the name of an array whose shape does not fit the shape of the weight; "" if all arrays fit."""
        if found := super().misfit():
            return found
        if self.scale_max is None or self.scale_mean is None:
            return "" if self.scale_max is self.scale_mean and self.scale.dtype != np.uint8 else "scale"
        if self.scale.dtype != np.uint8:
            return "scale"
        *lead, rows, columns = self.scale.shape
        fitting = (*lead, rows, -(-columns // SCALES)), (*lead, -(-rows // SCALES), columns)
        if self.scale_max.shape not in fitting:
            return "scale_max"
        return "" if self.scale_mean.shape == (*lead, 1, 1) else "scale_mean"


def codes(unit: jax.Array) -> jax.Array:
    """Return the stored code of the level nearest to each element, int4. `unit` is the weight divided by its scales."""
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


def _scales(scale: jax.Array, most: jax.Array | None, mean: jax.Array | None) -> jax.Array:
    """Return scales as floats. `scale` contains their 8-bit codes or, if `most` is None, the scales themselves.

    Rounding can make a scale negative, which would flip the signs of elements. Negative scales are replaced by 0.
    """
    if most is None or mean is None:
        return scale
    for axis, (size, groups) in enumerate(zip(scale.shape, most.shape, strict=True)):
        if size != groups:
            most = jax.lax.slice_in_dim(jnp.repeat(most, SCALES, axis=axis), 0, size, axis=axis)
    level = jnp.take(SCALE_LEVELS, scale.astype(jnp.int32), mode="clip")
    return jnp.maximum(mean + level * most, 0.0)


def _values(codes: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Return LEVELS[code] * scale for all codes. Each scale belongs to a block of codes along one axis."""
    for axis, (size, blocks) in enumerate(zip(codes.shape, scale.shape, strict=True)):
        scale = jnp.repeat(scale, size // blocks, axis=axis) if size != blocks else scale
    return (levels(codes) * scale.astype(jnp.float32)).astype(dtype)
