"""Define the values that each quantization format can represent, so that calibrated methods can round to them.

A grid is a set of levels. A weight of a group is a level times the group's scale. Methods that choose their own scales,
or that round one input at a time, read the grid of a format; rounding without data calls the format's scheme
(`llmctl.compress.schemes`). With unclipped scales both give the same weights, except that schemes may round the lowest
integer of a group, 7.5 steps below 0, to -8 instead of -7.

Shapes: I inputs, O outputs, G groups of K inputs.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from llmctl.model.weights import Node, NormalFloat, Quantized, nf4

CLIPS = tuple(1 - i / 40 for i in range(20))
"""Factors by which the clipping search multiplies the unclipped scale: from 1 down to 0.525, in the steps of AWQ."""
SMALLEST = float(jnp.finfo(jnp.float32).tiny) ** 0.5
"""Scales below this value are replaced by 1, as in qwix. All weights of such a group become 0."""


class Grid(abc.ABC):
    """Base class for the levels of a format. Grids are hashable, so that compiled functions can take them.

    >>> grid = Integers(4)
    >>> grid.round(jnp.array([6.4, -9.0, 0.2]), jnp.float32(0.5)).tolist()
    [3.5, -4.0, 0.0]
    """

    @property
    @abc.abstractmethod
    def bound(self) -> float:
        """Return the magnitude, as a multiple of the scale, that the largest weight of a group gets."""

    @abc.abstractmethod
    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the level nearest to each element of `unit`, a weight divided by its scale, as float32."""

    @abc.abstractmethod
    def node(self, level_IO: jax.Array, scale_GO: jax.Array) -> Node:
        """Return the weight node that stores these levels and scales."""

    def scale(self, magnitude: jax.Array, dtype: Any) -> jax.Array:
        """Return the scale of each group, given the group's largest magnitude.

        The scales are float32 numbers that `dtype`, the dtype of the matrix, can represent.
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
    """Integers of `bits` bits, symmetric around 0."""

    bits: int

    @property
    def bound(self) -> float:
        """Return the magnitude that the largest weight of a group gets, half a step above the largest integer."""
        return 2.0 ** (self.bits - 1) - 0.5

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest integers; halves are rounded to even integers.

        The lowest integer, such as -8, is not used: the largest weight of a group would be halfway between -7 and -8,
        and its last bit would decide.
        """
        top = 2.0 ** (self.bits - 1) - 1
        return jnp.clip(jnp.round(unit), -top, top)

    def node(self, level_IO: jax.Array, scale_GO: jax.Array) -> Quantized:
        """Return the weight node that stores these integers and scales."""
        dtype = jnp.dtype(f"int{self.bits}")
        return Quantized(qwix.QArray(level_IO.astype(dtype), scale_GO, qtype=dtype))


@dataclass(frozen=True)
class NormalFloats(Grid):
    """The 16 levels of NF4, from -1 to 1."""

    @property
    def bound(self) -> float:
        """Return 1, the largest level."""
        return 1.0

    def scale(self, magnitude: jax.Array, dtype: Any) -> jax.Array:
        """Return the scales of groups in float32, whatever the dtype of the matrix."""
        return jnp.where(magnitude == 0, 1.0, magnitude)

    def level(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """Return the level nearest to each weight. Weights are multiplied by the scale's reciprocal, as in
        bitsandbytes."""
        return self.nearest(w * (1 / scale))

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest levels."""
        return nf4.levels(nf4.codes(unit))

    def node(self, level_IO: jax.Array, scale_GO: jax.Array) -> NormalFloat:
        """Return the weight node that stores the codes of these levels, and the scales."""
        return NormalFloat(nf4.codes(level_IO), scale_GO.astype(jnp.float32))


GRIDS: dict[str, Grid] = {"int8": Integers(8), "int4": Integers(4), "nf4": NormalFloats()}
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
    highest_GO = magnitudes(w_IO, group)
    if not clip:
        return grid.scale(highest_GO, dtype)
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
        new_GO = grid.scale(highest_GO * ratio, dtype)
        error_GO = error(new_GO)
        better_GO = error_GO < least_GO
        return (jnp.where(better_GO, new_GO, scale_GO), jnp.where(better_GO, error_GO, least_GO)), None

    first_GO = grid.scale(highest_GO, dtype)
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
    return grid.node(level_IO, scale_GO.astype(dtype))


def clipped(w: jax.Array, grid: Grid, inputs: int, group: int) -> Node:
    """Return a weight rounded with the scales that have the least squared error of the weights.

    Args:
      w: a matrix [..., I, O] (`inputs` -2), or a table [V, D] (`inputs` -1).
      grid: the levels.
      inputs: axis of the inputs.
      group: number of inputs with one scale; 0 for all inputs.
    """
    one = partial(rounded, gram_II=None, grid=grid, group=group, clip=True)
    for _ in range(w.ndim - 2):
        one = jax.vmap(one)
    if inputs == -2:
        return one(w)
    return jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2), one(jnp.swapaxes(w, -1, -2)))
