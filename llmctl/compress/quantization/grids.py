"""Choose the scales of a matrix for the levels of a format, and round the matrix to the scaled levels.

The levels are in `llmctl.compress.quantization.levels`. Levels with zero points are in
`llmctl.compress.quantization.asymmetric`.

Shapes: I inputs, O outputs, G groups of K inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.compress.quantization.asymmetric import AsymmetricIntegers
from llmctl.compress.quantization.formats import Format
from llmctl.compress.quantization.levels import BlockFloats, Floats, Grid, Integers, NormalFloats
from llmctl.model.weights import Node

CLIPS = tuple(1 - i / 40 for i in range(20))
"""Factors by which the clipping search multiplies the unclipped scale: from 1 down to 0.525, in the steps of AWQ."""
GRIDS: dict[str, Grid] = {
    **{f"int{bits}": Integers(bits) for bits in (8, 4, 3, 2)},
    "fp8_e4m3": Floats("float8_e4m3fn"),
    "fp8_e5m2": Floats("float8_e5m2"),
    "nf4": NormalFloats(),
    "mxfp4": BlockFloats("mxfp4"),
    "nvfp4": BlockFloats("nvfp4"),
}
"""Grid of each quantization format, by the format's name."""
ASYMMETRIC: dict[str, Grid] = {f"int{bits}": AsymmetricIntegers(bits) for bits in (8, 4, 3, 2)}
"""Grid with zero points, by the format's name. Other formats cannot have zero points."""


def levels_of(form: Format) -> tuple[Grid, int]:
    """Return the grid of a format, and the number of inputs per scale; 0 for one scale per output."""
    if form.double_quantize:
        return NormalFloats(double_quantize=True), form.group
    return (GRIDS if form.symmetric else ASYMMETRIC)[form.scheme], form.group


def ranges(w_IO: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and the highest weight of each group, [G, O] each.

    `group` is the number of inputs of a group; 0 for all inputs.
    """
    inputs, outputs = w_IO.shape
    w_GKO = w_IO.astype(jnp.float32).reshape(-1, group or inputs, outputs)
    return jnp.min(w_GKO, axis=1), jnp.max(w_GKO, axis=1)


def scales(w_IO: jax.Array, grid: Grid, group: int, dtype: Any, gram_II: jax.Array | None, clip: bool) -> Any:
    """Return the scale of every group [G, O], float32, as `Grid.fit` returns it.

    Args:
      w_IO: the matrix, float32.
      grid: the levels.
      group: number of inputs of a group; 0 for all inputs.
      dtype: dtype of the matrix before quantization. Some formats store scales in this dtype.
      gram_II: Gram matrix of the inputs, for the clipping search. If None, the search minimizes the error of the
          weights.
      clip: whether to search for the scale with the least squared error of the group's outputs (AWQ: Lin et al., 2023,
          arXiv:2306.00978). Otherwise, the largest weight of a group determines its scale.
    """
    (low_GO, high_GO), whole = ranges(w_IO, group), grid.whole(w_IO)
    if not clip:
        return grid.fit(low_GO, high_GO, dtype, whole)
    inputs, outputs = w_IO.shape
    groups = len(low_GO)
    w_GKO = w_IO.reshape(groups, -1, outputs)
    blocks_GKK = None
    if gram_II is not None:
        size = inputs // groups
        blocks = gram_II.reshape(groups, size, groups, size)
        blocks_GKK = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)

    def error(scale_GO: Any) -> jax.Array:
        lost_GKO = grid.round(w_GKO, jax.tree.map(lambda a: a[:, None], scale_GO)) - w_GKO
        if blocks_GKK is None:
            return jnp.sum(jnp.square(lost_GKO), axis=1)
        product_GKO = jnp.einsum("gkl,glo->gko", blocks_GKK, lost_GKO, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(lost_GKO * product_GKO, axis=1)

    def attempt(best: tuple[Any, jax.Array], ratio: jax.Array) -> tuple[tuple[Any, jax.Array], None]:
        new_GO = grid.fit(low_GO * ratio, high_GO * ratio, dtype, whole)
        new = new_GO, error(new_GO)
        better_GO = new[1] < best[1]
        return jax.tree.map(lambda a, b: jnp.where(better_GO, a, b), new, best), None

    first_GO = grid.fit(low_GO, high_GO, dtype, whole)
    (best_GO, _), _ = jax.lax.scan(attempt, (first_GO, error(first_GO)), jnp.asarray(CLIPS[1:], jnp.float32))
    return best_GO


def spread(scale_GO: Any, inputs: int) -> Any:
    """Repeat the scales of groups [G, O] to one scale per weight [I, O]."""
    return jax.tree.map(lambda a: jnp.repeat(a, inputs // len(a), axis=0), scale_GO)


@partial(jax.jit, static_argnames=("grid", "group", "clip"))
def rounded(w_IO: jax.Array, gram_II: jax.Array | None, *, grid: Grid, group: int, clip: bool) -> Node:
    """Quantize one matrix: round it to the levels of a grid. `scales` describes the arguments."""
    dtype, w_IO = w_IO.dtype, w_IO.astype(jnp.float32)
    scale_GO = scales(w_IO, grid, group, dtype, gram_II, clip)
    level_IO = grid.level(w_IO, spread(scale_GO, len(w_IO)))
    return grid.node(level_IO, scale_GO, grid.whole(w_IO), dtype)


def quantized(w: jax.Array, grid: Grid, inputs: int, group: int, clip: bool) -> Node:
    """Quantize a weight without calibration data: round it to the levels of a grid.

    Args:
      w: a matrix [..., I, O] (`inputs` -2), or an embedding table [V, D] (`inputs` -1).
      grid: the levels.
      inputs: axis of the inputs.
      group: number of inputs per scale; 0 for one scale per output, or per row of an embedding table.
      clip: whether to search for the scales with the least squared error of the weights.
    """
    one = partial(rounded, gram_II=None, grid=grid, group=group, clip=clip)
    for _ in range(w.ndim - 2):
        one = jax.vmap(one)
    return one(w) if inputs in (-2, w.ndim - 2) else grid.table(one(jnp.swapaxes(w, -1, -2)))
