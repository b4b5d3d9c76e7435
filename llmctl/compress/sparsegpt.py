"""Prune a matrix by SparseGPT: choose zeros by the Hessian, and let the kept weights compensate for them.

(Frantar & Alistarh, 2023, arXiv:2301.00774.) The objective is the squared error of the matrix's outputs on the
calibration inputs X. Its Hessian is the Gram matrix X^T X. The inputs are processed in blocks. Within a block, the
weights with the lowest w^2 / [H^-1]_jj are pruned. Each pruned weight changes the weights of later inputs, so that the
error of the outputs becomes minimal.

The paper inverts the Hessian and factors the inverse. This code instead computes a Cholesky factor of the Hessian in
reverse order, and inverts the factor. The Hessian is first scaled to a diagonal of ones. Float32 therefore suffices.

Shapes: I inputs and O outputs of the matrix, S inputs per block.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmctl.compress.pattern import Pattern
from llmctl.compress.sparse_method import DAMPING

BLOCK = 128
"""Number of inputs whose weights compete in an unstructured pattern, as in the paper."""
ATTEMPTS = 4
"""Number of damping values that are tried. Each is ten times the one before."""


Block = tuple[jax.Array, jax.Array, jax.Array]
"""The weights of a block of inputs, the mask of its pruned weights, and their errors; each [S, O]."""


class Factor(NamedTuple):
    """Store a factor of the inverse of the damped Hessian."""

    upper_II: jax.Array
    """Upper triangular matrix R with H^-1 = R^T R."""
    live_I: jax.Array
    """Whether each input differs from 0 for at least one token."""
    attempts: jax.Array
    """Number of damping values that failed; ATTEMPTS if all failed. In that case R is diagonal, and weights are pruned
    by Wanda's score.
    """


class Solution(NamedTuple):
    """Store a pruned matrix and the number of damping values that failed (see `Factor`)."""

    weights_IO: jax.Array
    attempts: jax.Array


def factor(gram_II: jax.Array, damping: jax.Array | float) -> Factor:
    """Return the factor R of the inverse Hessian, H = gram + damping * mean diagonal * identity = (R^T R)^-1.

    An input that is always 0 (a dead channel) gets the mean diagonal entry of the other inputs, and does not influence
    them. If the Hessian is not positive definite in float32, the damping is multiplied by 10 and tried again. If every
    damping value fails, R is diagonal: the weights are then pruned by Wanda's score and do not compensate for one
    another.

    Args:
      gram_II: Gram matrix of the inputs, float32.
      damping: fraction of the mean diagonal entry.
    """
    inputs = len(gram_II)
    diagonal_I = jnp.diagonal(gram_II)
    live_I = diagonal_I != 0  # true for NaN, which the decomposition then reports as a failure
    mean = jnp.sum(jnp.where(live_I, diagonal_I, 0.0)) / jnp.maximum(live_I.sum(), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    gram_II = jnp.where(live_I[:, None] & live_I[None, :], gram_II, 0.0)
    base_I = jnp.where(live_I, diagonal_I, mean)
    eye_II = jnp.eye(inputs, dtype=gram_II.dtype)

    def attempt(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        count, _ = state
        damped_I = base_I + damping * 10.0**count * mean
        scale_I = jax.lax.rsqrt(damped_I)
        unit_II = gram_II * scale_I[:, None] * scale_I[None, :]
        unit_II = jnp.where(eye_II > 0, 1.0, unit_II)
        lower_II = jnp.linalg.cholesky(unit_II[::-1, ::-1])
        upper_II = jax.scipy.linalg.solve_triangular(lower_II[::-1, ::-1], eye_II, lower=False)
        return count + 1, upper_II * scale_I[None, :]

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        count, upper_II = state
        return (count < ATTEMPTS) & ((count == 0) | ~jnp.isfinite(upper_II).all())

    count, upper_II = jax.lax.while_loop(failed, attempt, (jnp.int32(0), jnp.zeros_like(gram_II)))
    good = jnp.isfinite(upper_II).all()
    norm_I = jnp.sqrt(jnp.where(jnp.isfinite(base_I), base_I, mean))
    upper_II = jnp.where(good, upper_II, eye_II / jnp.where(jnp.isfinite(norm_I), norm_I, 1.0))
    return Factor(upper_II, live_I, jnp.where(good, count - 1, ATTEMPTS))


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
    """Return the matrix with `count` zeros (or the zeros of an N:M pattern), and changed values of the kept weights.

    Weights that are zero stay zero and count towards the sparsity. In an unstructured pattern, every block prunes the
    same fraction of its nonzero weights.

    Args:
      w_IO: the matrix.
      gram_II: Gram matrix of the inputs, float32.
      count: number of zeros of an unstructured pattern.
      damping: fraction of the Hessian's mean diagonal entry that is added to its diagonal.
      pattern: sparsity pattern.
      block: number of inputs per block; rounded up to a multiple of the M of an N:M pattern.
    """
    dtype = w_IO.dtype
    w_IO = w_IO.astype(jnp.float32)
    inputs = len(w_IO)
    upper_II, live_I, attempts = factor(gram_II, damping)
    size = min(-(-block // (pattern.of or 1)) * (pattern.of or 1), inputs)
    blocks = -(-inputs // size)
    spare = blocks * size - inputs
    real_I = jnp.arange(blocks * size) < inputs
    w_IO = jnp.pad(w_IO, ((0, spare), (0, 0)))
    upper_II = jnp.pad(upper_II, ((0, spare), (0, spare)))
    diagonal_I = jnp.where(real_I, jnp.diagonal(upper_II), 1.0)
    live_I = jnp.pad(live_I, (0, spare))
    zero_IO = (w_IO == 0) & real_I[:, None]
    quotas = _quotas(zero_IO, real_I, blocks, count)
    group = pattern.of or size

    def one_block(b: jax.Array, w_IO: jax.Array) -> jax.Array:
        start = b * size
        w_SO = jax.lax.dynamic_slice_in_dim(w_IO, start, size)
        zero_SO = jax.lax.dynamic_slice_in_dim(zero_IO, start, size)
        real_S = jax.lax.dynamic_slice_in_dim(real_I, start, size)
        diagonal_S = jax.lax.dynamic_slice_in_dim(diagonal_I, start, size)
        live_S = jax.lax.dynamic_slice_in_dim(live_I, start, size)
        rows_SI = jax.lax.dynamic_slice_in_dim(upper_II, start, size)
        upper_SS = jax.lax.dynamic_slice_in_dim(rows_SI, start, size, axis=1)

        def one_group(g: jax.Array, state: Block) -> Block:
            w_SO, pruned_SO, error_SO = state
            first = g * group
            take = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=group)
            score = jnp.square(take(w_SO) / take(diagonal_S)[:, None]) * take(live_S)[:, None]
            score = jnp.where(take(zero_SO), -jnp.inf, jnp.where(take(real_S)[:, None], score, jnp.inf))
            if pattern.of:
                lowest = _lowest(score, pattern.of - pattern.keep)
            else:
                lowest = _lowest(score.reshape(-1, 1), quotas[b]).reshape(score.shape)
            lowest |= take(zero_SO)
            pruned_SO = jax.lax.dynamic_update_slice_in_dim(pruned_SO, lowest, first, axis=0)

            def one_input(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                w_SO, error_SO = state
                error_O = jnp.where(pruned_SO[i], w_SO[i], 0.0) / diagonal_S[i]
                return w_SO - upper_SS[i][:, None] * error_O, error_SO.at[i].set(error_O)

            w_SO, error_SO = jax.lax.fori_loop(first, first + group, one_input, (w_SO, error_SO))
            return w_SO, pruned_SO, error_SO

        state = (w_SO, jnp.zeros(w_SO.shape, bool), jnp.zeros_like(w_SO))
        w_SO, pruned_SO, error_SO = jax.lax.fori_loop(0, size // group, one_group, state)
        later_SI = jnp.where(jnp.arange(blocks * size) >= start + size, rows_SI, 0.0)
        w_IO -= jnp.matmul(later_SI.T, error_SO, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(w_IO, jnp.where(pruned_SO, 0.0, w_SO), start, axis=0)

    w_IO = jax.lax.fori_loop(0, blocks, one_block, w_IO)
    return Solution(w_IO[:inputs].astype(dtype), attempts)


def fallback(attempts: int, damping: float) -> str:
    """Describe what is used instead if `attempts` damping values failed; return an empty text if none failed."""
    if not attempts:
        return ""
    if attempts < ATTEMPTS:
        return f"damping {damping * 10**attempts:g}"
    return "wanda's score, kept weights unchanged: the Hessian has no inverse"


def _quotas(zero_IO: jax.Array, real_I: jax.Array, blocks: int, count: jax.Array | int) -> jax.Array:
    """Return the number of zeros in each block of inputs. The sum is `count`, or the existing zeros if they are more.

    Existing zeros stay. Further zeros are distributed over the blocks in proportion to each block's number of nonzero
    weights.
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

    If scores are equal, the first count as lower.
    """
    order = jnp.argsort(score_NO, axis=0, stable=True)
    return jnp.argsort(order, axis=0) < count
