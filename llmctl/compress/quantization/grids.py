"""Define the values that each quantization format can represent, so that calibrated methods can round to them.

A grid is a set of levels. A weight of a group is a level times the group's scale. Methods that choose their own scales,
or that round one input at a time, read the grid of a format; rounding without data calls the format's scheme
(`llmctl.compress.quantization.schemes`). With unclipped scales both give the same weights, except that schemes may
round the lowest integer of a group, 7.5 steps below 0, to -8 instead of -7.

Shapes: I inputs, O outputs, G groups of K inputs.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from llmctl.model.weights import Node, NormalFloat, Packed, Quantized, nf4, packed

CLIPS = tuple(1 - i / 40 for i in range(20))
"""Factors by which the clipping search multiplies the unclipped scale: from 1 down to 0.525, in the steps of AWQ."""
SMALLEST = float(jnp.finfo(jnp.float32).tiny) ** 0.5
"""Scales below this value are replaced by 1, as in qwix. All weights of such a group become 0."""


class Grid(abc.ABC):
    """Base class for the levels of a format. Grids are hashable, so that compiled functions can take them.

    >>> grid = Integers(4)
    >>> grid.round(jnp.array([6.4, -9.0, 0.2]), jnp.float32(0.5)).tolist()
    [3.5, -3.5, 0.0]
    """

    @property
    @abc.abstractmethod
    def bound(self) -> float:
        """Return the magnitude, as a multiple of the scale, that the largest weight of a group gets."""

    @abc.abstractmethod
    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the level nearest to each element of `unit`, a weight divided by its scale, as float32."""

    @abc.abstractmethod
    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Node:
        """Return the weight node that stores these levels and scales.

        Args:
          level_IO: levels of a matrix.
          scale_GO: scales, as `scale` returns them.
          whole: factor of the matrix, as `whole` returns it.
          dtype: dtype of the matrix.
        """

    def table(self, node: Any) -> Any:
        """Return a table [V, D] from the node of its transpose, a matrix [D, V]."""
        return jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2), node)

    def whole(self, w_IO: jax.Array) -> jax.Array:
        """Return the factor of the matrix that all scales contain, float32; 1 for most formats."""
        return jnp.float32(1)

    def scale(self, magnitude: jax.Array, dtype: Any, whole: jax.Array) -> jax.Array:
        """Return the scale of each group, given the group's largest magnitude: float32 numbers that the format stores.

        `dtype` is that of the matrix, and `whole` its factor.
        """
        scale = (magnitude / self.bound).astype(dtype).astype(jnp.float32)
        return jnp.where(scale < SMALLEST, 1.0, scale)

    def level(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """Return the level nearest to each weight, float32. The arrays are broadcast."""
        return self.nearest(w / scale)

    def round(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """Return the representable value nearest to each weight, float32. The arrays are broadcast."""
        return self.level(w, scale) * scale


@dataclass(frozen=True)
class Integers(Grid):
    """Integers of `bits` bits, with scales that are symmetric around 0. Those of 2 and 3 bits are packed."""

    bits: int

    @property
    def bound(self) -> float:
        """Return the magnitude that the largest weight of a group gets, half a step above the largest integer."""
        return 2.0 ** (self.bits - 1) - 0.5

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest integers; halves are rounded to even integers.

        From 4 bits on, the lowest integer, such as -8, is not used: the largest weight of a group would be halfway
        between -7 and -8, and its last bit would decide. Fewer bits cannot spare a level.
        """
        top = 2.0 ** (self.bits - 1) - 1
        return jnp.clip(jnp.round(unit), -top - (self.bits < 4), top)

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Node:
        """Return the weight node that stores these integers and scales."""
        if self.bits < 4:
            return Packed.of(f"int{self.bits}", level_IO, scale_GO.astype(dtype), _factor(whole, dtype))
        stored = jnp.dtype(f"int{self.bits}")
        return Quantized(qwix.QArray(level_IO.astype(stored), scale_GO.astype(dtype), qtype=stored))

    def table(self, node: Any) -> Any:
        """Return a table [V, D] from the node of its transpose, a matrix [D, V]."""
        return _packed_table(super().table(node)) if self.bits < 4 else super().table(node)


@dataclass(frozen=True)
class Floats(Grid):
    """Floats of 8 bits: float8_e4m3fn or float8_e5m2."""

    name: str

    @property
    def bound(self) -> float:
        """Return the largest finite float."""
        return float(jnp.finfo(self.name).max)

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest floats; halves are rounded to even codes."""
        return jnp.clip(unit, -self.bound, self.bound).astype(self.name).astype(jnp.float32)

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Quantized:
        """Return floats with scales."""
        return Quantized(qwix.QArray(level_IO.astype(self.name), scale_GO.astype(dtype), qtype=jnp.dtype(self.name)))


@dataclass(frozen=True)
class BlockFloats(Grid):
    """Floats of 4 bits (e2m1) with a scale per block: mxfp4 with powers of two, nvfp4 with float8_e4m3fn."""

    name: str

    @property
    def bound(self) -> float:
        """Return 6, the largest float."""
        return 6.0

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest floats; halves are rounded to even codes, as ml_dtypes does, and signs of zeros stay."""
        size = jnp.abs(unit)
        low, even = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)  # midpoints that go to the lower float, and to the higher
        code = sum(((size > bound).astype(jnp.int32) for bound in low), jnp.int32(0))
        code = sum(((size >= bound).astype(jnp.int32) for bound in even), code)
        level = jnp.zeros_like(size)
        for i, value in enumerate(packed.FLOATS):
            level = jnp.where(code == i, value, level)
        return jnp.copysign(level, unit)

    def whole(self, w_IO: jax.Array) -> jax.Array:
        """Return the factor of the matrix: for nvfp4, the largest block gets the largest scale, 448."""
        if self.name == "mxfp4":
            return jnp.float32(1)
        return jnp.maximum(jnp.max(jnp.abs(w_IO)) / (self.bound * 448), SMALLEST)

    def scale(self, magnitude: jax.Array, dtype: Any, whole: jax.Array) -> jax.Array:
        """Return the scales of blocks.

        A scale of mxfp4 is the power of two of the largest weight, divided by 4, the power of two of the largest float
        (OCP Microscaling specification 1.0, section 6.3). Weights may therefore be clipped.
        """
        if self.name == "mxfp4":
            stored = jnp.frexp(magnitude)[1] - 3 + packed.BIAS
            return packed.power(jnp.clip(jnp.where(magnitude > 0, stored, packed.BIAS), 1, 254))
        ratio = jnp.clip(magnitude / self.bound / whole, 2.0**-9, 448.0)  # the smallest and the largest scale
        return ratio.astype(jnp.float8_e4m3fn).astype(jnp.float32) * whole

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> Packed:
        """Return codes with scales."""
        if self.name == "mxfp4":
            return Packed.of(self.name, level_IO, scale_GO, _factor(whole, dtype))
        scale_GO = (scale_GO / whole).astype(jnp.float8_e4m3fn)  # exact after rounding
        return Packed.of(self.name, level_IO, scale_GO, _factor(whole, jnp.float32))

    def table(self, node: Any) -> Any:
        """Return a table [V, D] from the node of its transpose, a matrix [D, V]."""
        return _packed_table(super().table(node))


@dataclass(frozen=True)
class NormalFloats(Grid):
    """The 16 levels of NF4, from -1 to 1."""

    @property
    def bound(self) -> float:
        """Return 1, the largest level."""
        return 1.0

    def scale(self, magnitude: jax.Array, dtype: Any, whole: jax.Array) -> jax.Array:
        """Return the scales of groups. They are stored in float32, whatever the dtype of the matrix."""
        return jnp.where(magnitude == 0, 1.0, magnitude)

    def level(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """Return the level nearest to each weight. Weights are multiplied by the scale's reciprocal, as in
        bitsandbytes."""
        return self.nearest(w * (1 / scale))

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest levels."""
        return nf4.levels(nf4.codes(unit))

    def node(self, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, dtype: Any) -> NormalFloat:
        """Return codes with scales."""
        return NormalFloat(nf4.codes(level_IO), scale_GO.astype(jnp.float32))


GRIDS: dict[str, Grid] = {
    **{f"int{bits}": Integers(bits) for bits in (8, 4, 3, 2)},
    "fp8_e4m3": Floats("float8_e4m3fn"),
    "fp8_e5m2": Floats("float8_e5m2"),
    "nf4": NormalFloats(),
    "mxfp4": BlockFloats("mxfp4"),
    "nvfp4": BlockFloats("nvfp4"),
}
"""Grids by the name of the format."""


def magnitudes(w_IO: jax.Array, group: int) -> jax.Array:
    """Return the largest magnitude of each group [G, O]; `group` is the number of inputs of a group, 0 for all."""
    inputs, outputs = w_IO.shape
    return jnp.max(jnp.abs(w_IO.astype(jnp.float32)).reshape(-1, group or inputs, outputs), axis=1)


def scales(w_IO: jax.Array, grid: Grid, group: int, dtype: Any, gram_II: jax.Array | None, clip: bool) -> jax.Array:
    """Return the scale of every group [G, O], float32.

    Args:
      w_IO: the matrix, float32.
      grid: the levels.
      group: number of inputs of a group; 0 for all inputs.
      dtype: dtype of the stored matrix, which also limits the scales.
      gram_II: Gram matrix of the inputs, for the clipping search; None minimizes the error of the weights instead.
      clip: whether to search for the scale with the least squared error of the group's outputs (AWQ: Lin et al., 2023,
          arXiv:2306.00978). Otherwise, the largest weight of a group determines its scale.
    """
    highest_GO, whole = magnitudes(w_IO, group), grid.whole(w_IO)
    if not clip:
        return grid.scale(highest_GO, dtype, whole)
    inputs, outputs = w_IO.shape
    groups = len(highest_GO)
    w_GKO = w_IO.reshape(groups, -1, outputs)
    blocks_GKK = None
    if gram_II is not None:
        size = inputs // groups
        blocks = gram_II.reshape(groups, size, groups, size)
        blocks_GKK = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)

    def error(scale_GO: jax.Array) -> jax.Array:
        lost_GKO = grid.round(w_GKO, scale_GO[:, None]) - w_GKO
        if blocks_GKK is None:
            return jnp.sum(jnp.square(lost_GKO), axis=1)
        product_GKO = jnp.einsum("gkl,glo->gko", blocks_GKK, lost_GKO, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(lost_GKO * product_GKO, axis=1)

    def attempt(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale_GO, least_GO = best
        new_GO = grid.scale(highest_GO * ratio, dtype, whole)
        error_GO = error(new_GO)
        better_GO = error_GO < least_GO
        return (jnp.where(better_GO, new_GO, scale_GO), jnp.where(better_GO, error_GO, least_GO)), None

    first_GO = grid.scale(highest_GO, dtype, whole)
    (best_GO, _), _ = jax.lax.scan(attempt, (first_GO, error(first_GO)), jnp.asarray(CLIPS[1:], jnp.float32))
    return best_GO


def spread(scale_GO: jax.Array, inputs: int) -> jax.Array:
    """Return the scales of groups [G, O] as one scale per weight [I, O]."""
    return jnp.repeat(scale_GO, inputs // len(scale_GO), axis=0)


@partial(jax.jit, static_argnames=("grid", "group", "clip"))
def rounded(w_IO: jax.Array, gram_II: jax.Array | None, *, grid: Grid, group: int, clip: bool) -> Node:
    """Return one matrix rounded to the levels of a grid. `scales` describes the arguments."""
    dtype, w_IO = w_IO.dtype, w_IO.astype(jnp.float32)
    scale_GO = scales(w_IO, grid, group, dtype, gram_II, clip)
    level_IO = grid.level(w_IO, spread(scale_GO, len(w_IO)))
    return grid.node(level_IO, scale_GO, grid.whole(w_IO), dtype)


def quantized(w: jax.Array, grid: Grid, inputs: int, group: int, clip: bool) -> Node:
    """Return a weight rounded without data.

    Args:
      w: a matrix [..., I, O] (`inputs` -2), or a table [V, D] (`inputs` -1).
      grid: the levels.
      inputs: axis of the inputs.
      group: number of inputs with one scale; 0 for all inputs.
      clip: whether to search for the scales with the least squared error of the weights.
    """
    one = partial(rounded, gram_II=None, grid=grid, group=group, clip=clip)
    for _ in range(w.ndim - 2):
        one = jax.vmap(one)
    return one(w) if inputs in (-2, w.ndim - 2) else grid.table(one(jnp.swapaxes(w, -1, -2)))


def _factor(whole: jax.Array, dtype: Any) -> jax.Array:
    return jnp.reshape(whole, (1, 1)).astype(dtype)


def _packed_table(node: Packed) -> Packed:
    return replace(node, axis=-1)
