"""Convert between matrices with one entry per weight and matrices with one entry per block of a block pattern.

In an unstructured pattern, each weight is a block. Each function then returns its argument unchanged.

Shapes: I inputs and O outputs of a matrix, A inputs and B outputs per block, M = I / A and N = O / B blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmctl.compress.pruning.pattern import Pattern


def total_scores(score_IO: jax.Array, pattern: Pattern) -> jax.Array:
    """Return the sum of the scores in each block, [M, N].

    A score of -infinity means that the weight is already zero. Such a score counts as 0 in the sum. If all weights of a
    block are zero, the sum is -infinity.

    Args:
      score_IO: scores of the weights.
      pattern: sparsity pattern.
    """
    if not pattern.blocks:
        return score_IO
    zero_IO = jnp.isneginf(score_IO)
    total_MN = jnp.sum(_split(jnp.where(zero_IO, 0.0, score_IO), pattern), axis=(1, 3))
    return jnp.where(all_true(zero_IO, pattern), -jnp.inf, total_MN)


def all_true(mask_IO: jax.Array, pattern: Pattern) -> jax.Array:
    """Return, for each block, whether all of its entries are True, bool [M, N]."""
    return jnp.all(_split(mask_IO, pattern), axis=(1, 3)) if pattern.blocks else mask_IO


def expand(block_MN: jax.Array, pattern: Pattern) -> jax.Array:
    """Return a matrix [I, O] in which every weight has the value of its block."""
    if not pattern.blocks:
        return block_MN
    return jnp.repeat(jnp.repeat(block_MN, pattern.block_inputs, axis=0), pattern.block_outputs, axis=1)


def _split(a_IO: jax.Array, pattern: Pattern) -> jax.Array:
    """Reshape a matrix [I, O] to [M, A, N, B]. Axes 1 and 3 contain the weights of each block."""
    return a_IO.reshape(a_IO.shape[0] // pattern.block_inputs, pattern.block_inputs, -1, pattern.block_outputs)
