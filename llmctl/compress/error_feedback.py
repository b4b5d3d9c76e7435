"""Change a matrix input by input, and let the weights of later inputs compensate for the error of each change.

SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774) and GPTQ (Frantar et al., 2022, arXiv:2210.17323) both minimize
the squared error of the matrix's outputs on the calibration inputs X. The Hessian of this error is the Gram matrix X^T
X. A factor of the inverse Hessian determines how much the weights of later inputs change. The inputs are processed in
blocks. Within a block, the later inputs compensate for each change immediately. The inputs after the block compensate
once, for all changes of the block together.

The papers invert the Hessian and factor the inverse. This code instead computes a Cholesky factor of the Hessian in
reverse order, and inverts the factor. The Hessian is first scaled so that all diagonal entries are 1. Float32 therefore
suffices.

Shapes: I inputs and O outputs of the matrix, S inputs per block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from llmctl.compress.calibration.settings import DAMPING

BLOCK = 128
"""Number of inputs per block, as in the papers of SparseGPT and GPTQ."""
ATTEMPTS = 4
"""Number of damping values that are tried. Each value is ten times the value before."""

T = TypeVar("T")


class Factor(NamedTuple):
    """Store a factor of the inverse of the damped Hessian."""

    upper_II: jax.Array
    """Upper triangular matrix R with H^-1 = R^T R."""
    live_I: jax.Array
    """True for each input that differs from 0 for at least one token."""
    attempts: jax.Array
    """Number of damping values that failed; ATTEMPTS if all values failed. If all failed, R is diagonal, and the
    weights do not compensate for one another.
    """


class Block(NamedTuple):
    """Describe one block of inputs."""

    index: jax.Array
    """Index of the block, from 0."""
    upper_SS: jax.Array
    """Rows and columns of the factor R that belong to the block."""
    diagonal_S: jax.Array
    """Diagonal of `upper_SS`; 1 for inputs that pad the last block."""


Change = Callable[[Block, jax.Array, T], tuple[jax.Array, jax.Array, T]]
"""Function that changes one block. Its arguments are the block, the weights of the block [S, O], and a state. It
returns the changed weights, the errors divided by the factor's diagonal, and the new state."""


def factor(gram_II: jax.Array, damping: jax.Array | float = DAMPING) -> Factor:
    """Return the factor R of the inverse of the damped Hessian H: H^-1 = R^T R.

    H is gram + damping * (mean diagonal entry of gram) * identity.

    If an input is always 0 (a dead channel), its diagonal entry becomes the mean of the other entries. Such an input
    does not influence the other inputs. If the Hessian is not positive definite in float32, the damping is multiplied
    by 10 and tried again. If every damping value fails, R is diagonal: the weights do not compensate for one another.

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


def sweep(w_IO: jax.Array, upper_II: jax.Array, size: int, change: Change[T], state: T) -> tuple[jax.Array, T]:
    """Change all blocks of inputs in order, and return the changed matrix and the state after the last block.

    Args:
      w_IO: the matrix, float32.
      upper_II: factor R of the inverse Hessian (see `factor`).
      size: number of inputs per block.
      change: function that changes one block (see `Change`). The weights of a block already compensate for the changes
          of earlier blocks. If `size` does not divide the number of inputs, the last block is padded with zeros.
      state: initial value of the third argument of `change`, such as scales that each block may replace.
    """
    inputs = len(w_IO)
    blocks = -(-inputs // size)
    spare = blocks * size - inputs
    w_IO = jnp.pad(w_IO, ((0, spare), (0, 0)))
    upper_II = jnp.pad(upper_II, ((0, spare), (0, spare)))
    diagonal_I = jnp.where(jnp.arange(blocks * size) < inputs, jnp.diagonal(upper_II), 1.0)

    def one_block(b: jax.Array, carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        w_IO, state = carry
        start = b * size
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        rows_SI = take(upper_II)
        block = Block(b, take(rows_SI, axis=1), take(diagonal_I))
        w_SO, error_SO, state = change(block, take(w_IO), state)
        later_SI = jnp.where(jnp.arange(blocks * size) >= start + size, rows_SI, 0.0)
        w_IO -= jnp.matmul(later_SI.T, error_SO, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(w_IO, w_SO, start, axis=0), state

    w_IO, state = jax.lax.fori_loop(0, blocks, one_block, (w_IO, state))
    return w_IO[:inputs], state


def compensate(
    block: Block, i: jax.Array, lost_O: jax.Array, w_SO: jax.Array, error_SO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Update the weights of a block's later inputs, to compensate for changed weights of input `i`.

    Args:
      block: the block.
      i: index of the input in the block.
      lost_O: old minus new weights of input `i`.
      w_SO: weights of the block.
      error_SO: errors of the block's inputs. The error of an input is the old minus the new weights, divided by the
          factor's diagonal. Rows of inputs that have not changed yet are 0.

    Returns:
      The updated weights [S, O], and the errors [S, O], to which the error of input `i` is added.
    """
    error_O = lost_O / block.diagonal_S[i]
    return w_SO - block.upper_SS[i][:, None] * error_O, error_SO.at[i].set(error_O)


def fallback(attempts: int, damping: float, instead: str) -> str:
    """Return a message about failed damping values, for reports; an empty string if none failed.

    The message names the damping value that succeeded or, if all failed, the method that was used instead.

    Args:
      attempts: number of damping values that failed (see `Factor`).
      damping: the first damping value.
      instead: name of the method that is used if all damping values fail.
    """
    if not attempts:
        return ""
    if attempts < ATTEMPTS:
        return f"damping {damping * 10**attempts:g}"
    return f"{instead}: the Hessian has no inverse"
