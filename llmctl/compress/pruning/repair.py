"""Repair a pruned matrix: recompute the kept weights, so that the error of the outputs becomes minimal.

For every output, the kept weights are the least-squares solution on the calibration inputs X. A few steps of the
preconditioned conjugate-gradient method approximate this solution, for all outputs at once (ALPS: Meng et al., 2024,
arXiv:2406.07831). The steps read X only through its Gram matrix X^T X. Any mask can be repaired.

Shapes: I inputs and O outputs of the matrix.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

STEPS = 16
"""Number of conjugate-gradient steps."""
ROUNDING = 1e-6
"""Assumed relative rounding error of float32 when the squared error of an output is computed. The squared error is a
sum of positive and negative terms. Its rounding error is this number times the sum of the terms' absolute values. If
inputs are nearly collinear, the terms cancel, and the rounding error can exceed the squared error."""


@partial(jax.jit, static_argnames=("steps",))
def repair(original_IO: jax.Array, pruned_IO: jax.Array, gram_II: jax.Array, *, steps: int = STEPS) -> jax.Array:
    """Recompute the nonzero weights of a pruned matrix, so that the outputs are closest to the outputs before pruning.

    The squared error of every output is compared before and after the repair. The weights of an output change only if
    the error decreases by more than float32 rounding can explain (see `ROUNDING`). The error of an output therefore
    never increases.

    Args:
      original_IO: the matrix before pruning, whose outputs are the target.
      pruned_IO: the pruned matrix, from which the steps start.
      gram_II: Gram matrix of the inputs, float32.
      steps: number of conjugate-gradient steps.
    """
    dtype = pruned_IO.dtype
    original_IO, start_IO = original_IO.astype(jnp.float32), pruned_IO.astype(jnp.float32)
    kept_IO = start_IO != 0
    diagonal_I = jnp.diagonal(gram_II)
    scale_I1 = jnp.where(diagonal_I > 0, 1.0 / jnp.where(diagonal_I > 0, diagonal_I, 1.0), 0.0)[:, None]

    def times_gram(w_IO: jax.Array) -> jax.Array:
        return jnp.matmul(gram_II, w_IO, precision=jax.lax.Precision.HIGHEST)

    def step(_: int, state: State) -> State:
        w_IO, residual_IO, direction_IO, size_O = state
        product_IO = jnp.where(kept_IO, times_gram(direction_IO), 0.0)
        length_O = _ratio(size_O, jnp.sum(direction_IO * product_IO, axis=0))
        residual_IO -= length_O * product_IO
        scaled_IO = scale_I1 * residual_IO
        new_O = jnp.sum(residual_IO * scaled_IO, axis=0)
        return w_IO + length_O * direction_IO, residual_IO, scaled_IO + _ratio(new_O, size_O) * direction_IO, new_O

    residual_IO = jnp.where(kept_IO, times_gram(original_IO - start_IO), 0.0)
    scaled_IO = scale_I1 * residual_IO
    state = start_IO, residual_IO, scaled_IO, jnp.sum(residual_IO * scaled_IO, axis=0)
    repaired_IO = jax.lax.fori_loop(0, steps, step, state)[0].astype(dtype).astype(jnp.float32)

    def error(w_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
        lost_IO = w_IO - original_IO
        size_IO = jnp.abs(lost_IO)
        terms_O = jnp.sum(size_IO * jnp.matmul(jnp.abs(gram_II), size_IO), axis=0)
        return jnp.sum(lost_IO * times_gram(lost_IO), axis=0), ROUNDING * terms_O

    (new_O, new_bound_O), (old_O, old_bound_O) = error(repaired_IO), error(start_IO)
    better_O = new_O + new_bound_O < old_O - old_bound_O  # false for NaN
    return jnp.where(better_O, repaired_IO, start_IO).astype(dtype)


State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Weights, residuals and search directions [I, O], and the squared norm of the preconditioned residuals [O]."""


def _ratio(numerator_O: jax.Array, denominator_O: jax.Array) -> jax.Array:
    """Return numerator / denominator, one quotient per output of the matrix.

    If the denominator is 0, the quotient is 0, so that later steps do not change this output.
    """
    return jnp.where(denominator_O > 0, numerator_O / jnp.where(denominator_O > 0, denominator_O, 1.0), 0.0)
