"""Quantize a matrix by GPTQ: round input by input, and let later inputs compensate for the rounding errors.

`llmctl.compress.error_feedback` describes the objective and the blocks of GPTQ (Frantar et al., 2022,
arXiv:2210.17323). The weights of an input are rounded to the nearest levels of a format's grid
(`llmctl.compress.quantization.grids`). Weights that are zero stay zero.

Shapes: I inputs and O outputs of the matrix, S inputs per block, G groups of inputs with one scale each.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmctl.compress import error_feedback
from llmctl.compress.calibration.settings import DAMPING
from llmctl.compress.error_feedback import BLOCK, compensate, factor
from llmctl.compress.quantization import grids
from llmctl.compress.quantization.levels import Grid

State = tuple[jax.Array, jax.Array, Any]
"""The weights of a block of inputs and their errors [S, O], and the scales of all groups [G, O]."""


class Solution(NamedTuple):
    """Store a quantized matrix and the number of damping values that failed (see `error_feedback.Factor`)."""

    node: Any
    """Weight node that stores the quantized matrix."""
    attempts: jax.Array


@partial(jax.jit, static_argnames=("grid", "group", "act_order", "static_groups", "clip", "block"))
def quantize(
    w_IO: jax.Array,
    gram_II: jax.Array,
    damping: jax.Array | float = DAMPING,
    *,
    grid: Grid,
    group: int = 0,
    act_order: bool = True,
    static_groups: bool = True,
    clip: bool = False,
    block: int = BLOCK,
) -> Solution:
    """Return the matrix with its weights rounded to the levels of a grid.

    If no damping value gives an invertible Hessian, the weights are rounded independently of one another.

    Args:
      w_IO: the matrix.
      gram_II: Gram matrix of the inputs, float32.
      damping: number that is added to the Hessian's diagonal, as a fraction of the mean diagonal entry.
      grid: levels of the format.
      group: number of inputs per scale, which must divide the number of inputs; 0 for one scale per output.
      act_order: whether to round inputs with larger sums of squares first, while many inputs remain to compensate.
      static_groups: whether scales are computed from the unchanged matrix. Otherwise a group's scale is determined when
          the group's first input is rounded, from weights that include the compensation. False requires `act_order` to
          be false too.
      clip: whether to search for smaller scales that clip the largest weights (see `grids.scales`), if scales are
          static.
      block: number of inputs per block; rounded to a multiple of `group`.
    """
    dtype, w_IO = w_IO.dtype, w_IO.astype(jnp.float32)
    inputs = len(w_IO)
    width = group or inputs
    whole = grid.whole(w_IO)
    scale_GO = grids.scales(w_IO, grid, group, dtype, gram_II, clip)
    order_I = jnp.argsort(-jnp.diagonal(gram_II), stable=True) if act_order else jnp.arange(inputs)
    upper_II, _, attempts = factor(gram_II[order_I][:, order_I], damping)
    dynamic = bool(group) and not static_groups
    size = width * max(1, block // width) if dynamic else block
    size = min(size, inputs)
    spare = -inputs % size
    zero_IO = jnp.pad(w_IO[order_I] == 0, ((0, spare), (0, 0)))
    group_I = jnp.pad(order_I // width, (0, spare))

    def of_group(scale_GO: Any, group: jax.Array) -> Any:
        return jax.tree.map(lambda a: a[group], scale_GO)

    def one_block(block: error_feedback.Block, w_SO: jax.Array, scale_GO: Any) -> tuple[jax.Array, jax.Array, Any]:
        first = block.index * size
        zero_SO = jax.lax.dynamic_slice_in_dim(zero_IO, first, size)

        def one_input(i: jax.Array, state: State) -> State:
            w_SO, error_SO, scale_GO = state
            if dynamic:
                scale_GO = jax.lax.cond(i % width == 0, lambda: rescaled(i, w_SO, scale_GO), lambda: scale_GO)
            new_O = jnp.where(zero_SO[i], 0.0, grid.round(w_SO[i], of_group(scale_GO, group_I[first + i])))
            w_SO, error_SO = compensate(block, i, w_SO[i] - new_O, w_SO, error_SO)
            return w_SO.at[i].set(new_O), error_SO, scale_GO

        def rescaled(i: jax.Array, w_SO: jax.Array, scale_GO: Any) -> Any:
            w_KO = jax.lax.dynamic_slice_in_dim(w_SO, i, width)
            new_O = grid.fit(jnp.min(w_KO, axis=0), jnp.max(w_KO, axis=0), dtype, whole)
            return jax.tree.map(lambda a, b: a.at[(first + i) // width].set(b), scale_GO, new_O)

        return jax.lax.fori_loop(0, size, one_input, (w_SO, jnp.zeros_like(w_SO), scale_GO))

    new_IO, scale_GO = error_feedback.sweep(w_IO[order_I], upper_II, size, one_block, scale_GO)
    new_IO = jnp.zeros_like(w_IO).at[order_I].set(new_IO)
    level_IO = grid.level(new_IO, grids.spread(scale_GO, inputs))  # exact: the values are levels times scales
    return Solution(grid.node(level_IO, scale_GO, whole, dtype), attempts)


def fallback(attempts: int, damping: float) -> str:
    """Return the message for reports if `attempts` damping values failed (see `error_feedback.fallback`)."""
    return error_feedback.fallback(attempts, damping, "rounding to nearest")
