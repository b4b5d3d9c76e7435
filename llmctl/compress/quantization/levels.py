"""Define the values that each quantization format can represent, so that calibrated methods can round to these values.

A grid is a set of levels, such as the integers from -7 to 7. A quantized weight is a level times the scale of its
group. Grids serve methods that choose their own scales, or that round one input at a time. Plain rounding without data
calls the format's scheme instead (`llmctl.compress.quantization.schemes`). If scales are not clipped, grids and schemes
give the same weights, with one exception. In int4, the scale maps the largest magnitude of a group to 7.5. A negative
weight with this magnitude is therefore halfway between -7 and -8. A grid rounds this weight to -7, and a scheme may
round this weight to -8.

Shapes: I inputs, O outputs, G groups of K inputs.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from llmctl.model.weights import Node, NormalFloat, Packed, Quantized, nf4, packed
from llmctl.model.weights.learned_scale import limits as integer_limits

SMALLEST = float(jnp.finfo(jnp.float32).tiny) ** 0.5
"""Smallest scale that is stored. A group with a smaller scale gets the scale 1, as in qwix, and all weights of the
group become 0."""


class Grid(abc.ABC):
    """Define the interface of all grids. Grids are hashable, so they can be static arguments of `jax.jit`.

    >>> grid = Integers(4)
    >>> grid.round(jnp.array([6.4, -9.0, 0.2]), jnp.float32(0.5)).tolist()
    [3.5, -3.5, 0.0]
    """

    @property
    @abc.abstractmethod
    def bound(self) -> float:
        """Return the quotient max|w| / scale for a group whose scale is not clipped."""

    @abc.abstractmethod
    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest level to each element of `unit`, float32. An element is a weight divided by its scale."""

    @abc.abstractmethod
    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Node:
        """Return the weight node that stores a quantized matrix.

        Args:
          level_IO: levels of the matrix.
          scale_GO: scales, as `scale` returns them.
          whole: factor of all scales of the matrix, as `whole` returns it.
          dtype: dtype of the matrix before quantization.
        """

    def table(self, node: Any) -> Any:
        """Return the node of an embedding table [V, D], given the node of the transposed matrix [D, V]."""
        return jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2), node)

    def whole(self, w_IO: jax.Array) -> jax.Array:
        """Return the float32 factor by which all scales of the matrix are multiplied: 1 except for nvfp4."""
        return jnp.float32(1)

    def fit(self, low: jax.Array, high: jax.Array, dtype: Any, whole: jax.Array) -> Any:
        """Return the scale of each group, given the group's lowest and highest weight (see `scale`).

        If a grid is not symmetric around 0, return the scale and the zero point of each group.
        """
        return self.scale(jnp.maximum(-low, high), dtype, whole)

    def scale(self, magnitude: jax.Array, dtype: Any, whole: jax.Array) -> jax.Array:
        """Return the scale of each group, rounded to a number that the format can store, as float32.

        Args:
          magnitude: max|w| of each group.
          dtype: dtype of the matrix before quantization.
          whole: factor of all scales of the matrix, as `whole` returns it.
        """
        scale = (magnitude / self.bound).astype(dtype).astype(jnp.float32)
        return jnp.where(scale < SMALLEST, 1.0, scale)

    def level(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """Return the level nearest to each weight, float32. `scale` is broadcast to the shape of `w`."""
        return self.nearest(w / scale)

    def round(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """Round each weight to the nearest level times scale, float32. `scale` is broadcast to the shape of `w`."""
        return self.level(w, scale) * scale


class IntegerGrid(Grid):
    """Define the base class of grids with integer levels, whose limits AutoRound reads."""

    @abc.abstractmethod
    def limits(self, scale: Any) -> tuple[Any, Any]:
        """Return the lowest and the highest level, given the scales that `fit` returns."""

    @abc.abstractmethod
    def step(self, scale: Any) -> jax.Array:
        """Return the distance between neighboring values, given the scales that `fit` returns."""


@dataclass(frozen=True)
class Integers(IntegerGrid):
    """Define signed integers of 2, 3, 4 or 8 bits without a zero point.

    Integers of 2 and 3 bits are packed into bytes.
    """

    bits: int

    @property
    def bound(self) -> float:
        """Return the quotient max|w| / scale for a group: half a step above the largest integer."""
        return 2.0 ** (self.bits - 1) - 0.5

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest integers. Ties are rounded to even.

        With 4 and 8 bits, the lowest integer (-8, -128) is not used. Otherwise, float rounding would decide between -7
        and -8, because a group's largest weight can be -7.5 times the scale. With 2 and 3 bits, all integers are used,
        because there are few.
        """
        return jnp.clip(jnp.round(unit), *self.limits(None))

    def limits(self, scale: Any) -> tuple[float, float]:
        """Return the lowest and the highest integer that is used."""
        return integer_limits(self.bits)

    def step(self, scale: Any) -> jax.Array:
        """Return the distance between neighboring values, which is the scale."""
        return scale

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Node:
        """Return the weight node that stores the integers and scales of a matrix."""
        if self.bits < 4:
            return Packed.of(f"int{self.bits}", level_IO, scale_GO.astype(dtype), _factor(whole, dtype))
        stored = jnp.dtype(f"int{self.bits}")
        return Quantized(qwix.QArray(level_IO.astype(stored), scale_GO.astype(dtype), qtype=stored))

    def table(self, node: Any) -> Any:
        """Return the node of an embedding table [V, D], given the node of the transposed matrix [D, V]."""
        return packed_table(super().table(node)) if self.bits < 4 else super().table(node)


@dataclass(frozen=True)
class Floats(Grid):
    """Define 8-bit floats: float8_e4m3fn or float8_e5m2."""

    name: str

    @property
    def bound(self) -> float:
        """Return the quotient max|w| / scale for a group: the largest finite float of the format."""
        return float(jnp.finfo(self.name).max)

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest floats of the format. Ties are rounded to even."""
        return jnp.clip(unit, -self.bound, self.bound).astype(self.name).astype(jnp.float32)

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Quantized:
        """Return the weight node that stores the 8-bit floats and scales of a matrix."""
        return Quantized(qwix.QArray(level_IO.astype(self.name), scale_GO.astype(dtype), qtype=jnp.dtype(self.name)))


@dataclass(frozen=True)
class BlockFloats(Grid):
    """Define 4-bit floats (e2m1). Scales of mxfp4 are powers of two. Scales of nvfp4 are float8_e4m3fn."""

    name: str

    @property
    def bound(self) -> float:
        """Return 6, the largest float of e2m1. In nvfp4, this is also the quotient max|w| / scale."""
        return 6.0

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest floats of e2m1. Ties are rounded to even, and zeros keep their sign, as in ml_dtypes."""
        size = jnp.abs(unit)
        low, even = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)  # midpoints that go to the lower float, and to the higher
        code = sum(((size > bound).astype(jnp.int32) for bound in low), jnp.int32(0))
        code = sum(((size >= bound).astype(jnp.int32) for bound in even), code)
        level = jnp.zeros_like(size)
        for i, value in enumerate(packed.FLOATS):
            level = jnp.where(code == i, value, level)
        return jnp.copysign(level, unit)

    def whole(self, w_IO: jax.Array) -> jax.Array:
        """Return the factor by which all scales of the matrix are multiplied.

        nvfp4: largest scale / 448 (the maximum of float8_e4m3fn). mxfp4: 1.
        """
        if self.name == "mxfp4":
            return jnp.float32(1)
        return jnp.maximum(jnp.max(jnp.abs(w_IO)) / (self.bound * 448), SMALLEST)

    def scale(self, magnitude: jax.Array, dtype: Any, whole: jax.Array) -> jax.Array:
        """Return the scale of each block, float32, from max|w| of the block (see `Grid.scale`).

        For mxfp4, the scale is 2^(floor(log2(max|w|)) - 2), as in section 6.3 of the OCP Microscaling specification
        1.0. The quotient max|w| / scale is therefore between 4 and 8. Magnitudes above 6 * scale are clipped, because 6
        is the largest float of e2m1. For nvfp4, the scale is max|w| / 6, rounded to the product of a float8_e4m3fn and
        the matrix's factor (see `whole`).
        """
        if self.name == "mxfp4":
            stored = jnp.frexp(magnitude)[1] - 3 + packed.BIAS
            return packed.power(jnp.clip(jnp.where(magnitude > 0, stored, packed.BIAS), 1, 254))
        ratio = jnp.clip(magnitude / self.bound / whole, 2.0**-9, 448.0)  # the smallest and the largest scale
        return ratio.astype(jnp.float8_e4m3fn).astype(jnp.float32) * whole

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Packed:
        """Return the weight node that stores the packed codes and the scales of a matrix."""
        if self.name == "mxfp4":
            return Packed.of(self.name, level_IO, scale_GO, _factor(whole, dtype))
        scale_GO = (scale_GO / whole).astype(jnp.float8_e4m3fn)  # exact after rounding
        return Packed.of(self.name, level_IO, scale_GO, _factor(whole, jnp.float32))

    def table(self, node: Any) -> Any:
        """Return the node of an embedding table [V, D], given the node of the transposed matrix [D, V]."""
        return packed_table(super().table(node))


@dataclass(frozen=True)
class NormalFloats(Grid):
    """Define the 16 levels of NF4, from -1 to 1."""

    double_quantize: bool = False
    """Whether scales are stored in 8 bits. Weights are rounded with the scales before this conversion."""

    @property
    def bound(self) -> float:
        """Return the quotient max|w| / scale for a block: 1, the largest level."""
        return 1.0

    def scale(self, magnitude: jax.Array, dtype: Any, whole: jax.Array) -> jax.Array:
        """Return max|w| of each block as its scale. NF4 stores scales in float32 for every dtype of the matrix."""
        return jnp.where(magnitude == 0, 1.0, magnitude)

    def level(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """Return the nearest level to each weight, float32.

        Weights are multiplied by the reciprocal of the scale. The results are therefore identical to those of
        bitsandbytes.
        """
        return self.nearest(w * (1 / scale))

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest level to each element of `unit`, float32."""
        return nf4.levels(nf4.codes(unit))

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> NormalFloat:
        """Return the weight node that stores the 4-bit codes and the scales of a matrix."""
        if not self.double_quantize:
            return NormalFloat(nf4.codes(level_IO), scale_GO.astype(jnp.float32))
        # A block of zeros has the scale 1 (see `scale`), which would dominate the groups of scales.
        filled_GO = jnp.any(level_IO.reshape(len(scale_GO), -1, level_IO.shape[-1]) != 0, axis=1)
        scale_GO = jnp.where(filled_GO, scale_GO, 0.0).astype(jnp.float32)
        return NormalFloat(nf4.codes(level_IO), scale_GO).double_quantized()


def _factor(whole: jax.Array, dtype: Any) -> jax.Array:
    return jnp.reshape(whole, (1, 1)).astype(dtype)


def packed_table(node: Packed) -> Packed:
    """Return the node of an embedding table [V, D], given a packed node whose arrays are those of the table."""
    return replace(node, axis=-1)
