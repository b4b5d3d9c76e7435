"""Prune a matrix by SparseGPT: choose zeros by the Hessian, and let the kept weights compensate for the zeros.

SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774) processes the inputs in blocks
(`llmctl.compress.error_feedback`). Within a block, the weights with the lowest w^2 / [H^-1]_jj are pruned. Each pruned
weight changes the weights of later inputs, so that the error of the outputs becomes minimal.

Shapes: I inputs and O outputs of the matrix, S inputs per block.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmctl.compress import error_feedback
from llmctl.compress.calibration.settings import DAMPING
from llmctl.compress.error_feedback import BLOCK, compensate, factor
from llmctl.compress.pruning import block_pattern
from llmctl.compress.pruning.pattern import Pattern

State = tuple[jax.Array, jax.Array, jax.Array]
"""Weights of a block of inputs, mask of the pruned weights, and errors of the weights; each [S, O]."""


class Solution(NamedTuple):
    """Store a pruned matrix and the number of damping values that failed (see `error_feedback.Factor`)."""

    weights_IO: jax.Array
    attempts: jax.Array


@partial(jax.jit, static_argnames=("pattern", "block"))
def prune(
    w_IO: jax.Array,
    gram_II: jax.Array,
    count: jax.Array | int,
    damping: jax.Array | float = DAMPING,
    *,
    pattern: Pattern,
    block: int = BLOCK,
) -> Solution:
    """Return the pruned matrix, with `count` zeros and updated kept weights.

    Weights that are zero stay zero and count towards the sparsity. In an unstructured pattern, the same fraction of
    nonzero weights is pruned in every block of inputs. In a block pattern, the same fraction of nonzero blocks of
    weights is pruned in every block of inputs. In an N:M pattern, the pattern gives the number of zeros.

    Args:
      w_IO: the matrix.
      gram_II: Gram matrix of the inputs, float32.
      count: number of weights or blocks to prune, except in an N:M pattern.
      damping: number that is added to the Hessian's diagonal, as a fraction of the mean diagonal entry.
      pattern: sparsity pattern.
      block: number of inputs that are processed together. In an N:M pattern, the number is rounded up to a multiple of
          M. In a block pattern, the number is rounded up to a multiple of `pattern.block_inputs`.
    """
    dtype = w_IO.dtype
    w_IO = w_IO.astype(jnp.float32)
    inputs = len(w_IO)
    upper_II, live_I, attempts = factor(gram_II, damping)
    unit = pattern.of or pattern.block_inputs
    size = min(-(-block // unit) * unit, inputs)
    blocks = -(-inputs // size)
    spare = blocks * size - inputs
    real_I, live_I = jnp.arange(blocks * size) < inputs, jnp.pad(live_I, (0, spare))
    zero_IO = jnp.pad(w_IO == 0, ((0, spare), (0, 0)))
    quotas = _quotas(block_pattern.all_true(zero_IO, pattern), real_I[:: pattern.block_inputs], blocks, count)
    group = pattern.of or size

    def one_block(
        block: error_feedback.Block, w_SO: jax.Array, state: tuple[()]
    ) -> tuple[jax.Array, jax.Array, tuple[()]]:
        own = partial(jax.lax.dynamic_slice_in_dim, start_index=block.index * size, slice_size=size)
        zero_SO, real_S, live_S = own(zero_IO), own(real_I), own(live_I)

        def one_group(g: jax.Array, state: State) -> State:
            w_SO, pruned_SO, error_SO = state
            first = g * group
            take = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=group)
            score = jnp.square(take(w_SO) / take(block.diagonal_S)[:, None]) * take(live_S)[:, None]
            score = jnp.where(take(zero_SO), -jnp.inf, jnp.where(take(real_S)[:, None], score, jnp.inf))
            if pattern.of:
                lowest = _lowest(score, pattern.of - pattern.keep)
            else:
                score = block_pattern.total_scores(score, pattern)
                lowest = _lowest(score.reshape(-1, 1), quotas[block.index]).reshape(score.shape)
                lowest = block_pattern.expand(lowest, pattern)
            lowest |= take(zero_SO)
            pruned_SO = jax.lax.dynamic_update_slice_in_dim(pruned_SO, lowest, first, axis=0)

            def one_input(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                w_SO, error_SO = state
                return compensate(block, i, jnp.where(pruned_SO[i], w_SO[i], 0.0), w_SO, error_SO)

            w_SO, error_SO = jax.lax.fori_loop(first, first + group, one_input, (w_SO, error_SO))
            return w_SO, pruned_SO, error_SO

        start = (w_SO, jnp.zeros(w_SO.shape, bool), jnp.zeros_like(w_SO))
        w_SO, pruned_SO, error_SO = jax.lax.fori_loop(0, size // group, one_group, start)
        return jnp.where(pruned_SO, 0.0, w_SO), error_SO, ()

    w_IO, _ = error_feedback.sweep(w_IO, upper_II, size, one_block, ())
    return Solution(w_IO.astype(dtype), attempts)


def fallback(attempts: int, damping: float) -> str:
    """Return the message for reports if `attempts` damping values failed (see `error_feedback.fallback`)."""
    return error_feedback.fallback(attempts, damping, "wanda's score, kept weights unchanged")


def _quotas(zero_IO: jax.Array, real_I: jax.Array, blocks: int, count: jax.Array | int) -> jax.Array:
    """Return the number of zeros that each block of inputs has after pruning.

    The sum over the blocks is the larger of `count` and the number of existing zeros.

    Existing zeros stay. Further zeros are distributed over the blocks in proportion to each block's number of nonzero
    weights. In a block pattern, blocks of weights are counted in place of weights.
    """
    zeros = zero_IO.reshape(blocks, -1).sum(axis=1)
    others = real_I.reshape(blocks, -1).sum(axis=1) * zero_IO.shape[1] - zeros
    missing = jnp.maximum(count - zeros.sum(), 0)
    share = jnp.cumsum(others) / jnp.maximum(others.sum(), 1)
    until = jnp.round(share * missing).astype(jnp.int32)
    until = jnp.minimum(until, missing).at[-1].set(missing)  # float32 rounds integers above 2^24, also upwards
    return zeros + jnp.diff(until, prepend=0)


def _lowest(score_NO: jax.Array, count: jax.Array | int) -> jax.Array:
    """Return a mask that is True at the `count` lowest scores of each column.

    If scores are equal, the first scores count as lower.
    """
    order = jnp.argsort(score_NO, axis=0, stable=True)
    return jnp.argsort(order, axis=0) < count
