"""Compute masks from scores: the weights with the lowest scores are pruned, in a sparsity pattern.

Shapes: I inputs and O outputs of a matrix, G groups of inputs in a pattern such as 2:4, M times N blocks in a block
pattern. In the name "N:M", the letters mean that N of every M inputs are kept.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from llmctl.compress.pruning import block_pattern
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.model import weights
from llmctl.model.weights import Weight


def mask(
    score_IO: jax.Array, pattern: Pattern, per: Literal["matrix", "output"], count: jax.Array | int | None = None
) -> jax.Array:
    """Return a mask [I, O] that is True for every weight to keep.

    If scores are equal, weights with lower indices are pruned first.

    Args:
      score_IO: scores; the lowest are pruned. A weight that is already zero has the score -infinity.
      pattern: sparsity pattern. In a block pattern, the score of a block is the sum of its weights' scores.
      per: group within which scores compete: "matrix", or "output" for the inputs of each output. An N:M pattern does
        not use `per`.
      count: number of weights to prune in the matrix; by default the number that the pattern gives.

        - In a block pattern, `count` is the number of blocks.
        - In an N:M pattern, `count` is the number per group of M inputs.
        - If `per` is "output", the number is divided evenly over the outputs. The first outputs get the remainder.
        - An array [O] has one number per output, or per block of outputs in a block pattern.

    Raises:
      RequestError: If the M of an N:M pattern does not divide the number of inputs.
    """
    inputs, outputs = score_IO.shape
    if pattern.of:
        pattern.check(inputs, outputs)
        score_GMO = score_IO.reshape(inputs // pattern.of, pattern.of, outputs)
        keep = pattern.keep if count is None else pattern.of - count
        return _keep_highest(score_GMO, keep, axis=1).reshape(inputs, outputs)
    count = pattern.count(inputs, outputs, per) if count is None else count
    score_MN = block_pattern.total_scores(score_IO, pattern)
    if per == "output":
        each_N = count if jnp.ndim(count) else _shares(count, score_MN.shape[1])
        kept_MN = _keep_highest(score_MN, len(score_MN) - each_N, axis=0)
    else:
        kept_MN = _keep_highest(score_MN.reshape(-1), score_MN.size - count, axis=0).reshape(score_MN.shape)
    return block_pattern.expand(kept_MN, pattern)


def _shares(count: jax.Array | int, outputs: int) -> jax.Array:
    return count // outputs + (jnp.arange(outputs) < count % outputs)


def counts_with_zeros(w: Weight, count: int | None, method: SparseMethod) -> jax.Array | int | None:
    """Adapt the argument `count` of `mask` to a matrix that may already contain zeros, and return it.

    Existing zeros stay and are counted. If scores compete per output, every output has an equal share of `count`. The
    result is `count` itself, unless an output already has more zeros than its share.

    If an output has more zeros than its share, the result is an array [O]: the number of zeros per output. The other
    outputs then get fewer zeros than their shares. The sum of the array is `count` or, if larger, the number of
    existing zeros.
    """
    if method.per == "matrix" or count is None:
        return count
    counts_O, exceeded = _with_zeros(weights.as_node(w).values(), count, pattern=method.pattern)
    return counts_O if exceeded else count


@partial(jax.jit, static_argnames="pattern")
def _with_zeros(values_IO: jax.Array, count: jax.Array | int, *, pattern: Pattern) -> tuple[jax.Array, jax.Array]:
    """Return the number of zeros per output after pruning, [O], and whether any output already had more than its share.

    The share of an output is `count` divided by the number of outputs. The numbers include existing zeros. The sum of
    the numbers is the larger of `count` and the number of existing zeros. Only outputs with fewer zeros than their
    share get new zeros, in proportion to the missing zeros. In a block pattern, blocks are counted in place of weights.
    """
    zero_IO = block_pattern.all_true(values_IO == 0, pattern)
    zeros_O = jnp.sum(zero_IO, axis=0)
    each_O = _shares(count, zero_IO.shape[1])
    until_O = jnp.cumsum(jnp.maximum(each_O - zeros_O, 0))
    missing, share_O = jnp.maximum(count - jnp.sum(zeros_O), 0), until_O / jnp.maximum(until_O[-1], 1)
    until_O = jnp.minimum(jnp.round(share_O * missing).astype(jnp.int32), missing).at[-1].set(missing)
    return zeros_O + jnp.diff(until_O, prepend=0), jnp.any(zeros_O > each_O)


def _keep_highest(score: jax.Array, keep: jax.Array | int, axis: int) -> jax.Array:
    """Return a boolean mask of the shape of `score`, True at the `keep` highest scores along `axis`.

    The mask is computed from ranks, so that equal scores do not change the number of kept weights.
    """
    order = jnp.argsort(score, axis=axis, stable=True)
    rank = jnp.argsort(order, axis=axis)
    return rank >= score.shape[axis] - keep
