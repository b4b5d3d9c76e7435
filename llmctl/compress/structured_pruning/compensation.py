"""Compensate a matrix for removed inputs, by least squares on the calibration data.

The kept rows of the matrix are recomputed, so that the squared error of the outputs becomes minimal. The solution is W'
= W_kept + C_kept^-1 C_kept,removed W_removed, for the Gram matrix C of the inputs. SliceGPT solves the same problem for
rotated inputs (Ashkboos et al., 2024, arXiv:2401.15024). If the matrix has a bias, C is the covariance. The mean of the
removed inputs' contribution is then added to the bias (FLAP: An et al., 2024, arXiv:2312.11983).

Shapes: I inputs, O outputs, K kept inputs, R removed inputs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

RIDGE = 1e-4
"""Ridge regularization, as a fraction of each kept input's sum of squares. The regularization limits the
weights of nearly collinear inputs."""


def compensate(
    w_IO: jax.Array,
    bias_O: jax.Array | None,
    kept: np.ndarray,
    gram_II: jax.Array,
    sums_I: jax.Array,
    count: jax.Array,
    ridge: float = RIDGE,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the new matrix [I, O] and bias. Rows of removed inputs are zero, and rows of kept inputs are recomputed.

    If the least-squares problem has no solution in float32, the kept rows do not change.

    Args:
      w_IO: the matrix with all inputs.
      bias_O: bias of the matrix; None if the matrix has no bias.
      kept: ascending indices of the kept inputs.
      gram_II: Gram matrix of the inputs.
      sums_I: sums of the inputs over the tokens.
      count: number of tokens.
      ridge: see `RIDGE`.
    """
    removed = np.setdiff1d(np.arange(w_IO.shape[0]), kept)
    centered = bias_O is not None
    w32_IO = w_IO.astype(jnp.float32)
    added_KO, added_O = solve(w32_IO, jnp.asarray(kept), jnp.asarray(removed), gram_II, sums_I, count, ridge, centered)
    out_IO = jnp.zeros_like(w32_IO).at[kept].set(w32_IO[kept] + added_KO).astype(w_IO.dtype)
    return out_IO, None if bias_O is None else (bias_O + added_O).astype(bias_O.dtype)


@partial(jax.jit, static_argnames=("centered",))
def solve(
    w_IO: jax.Array,
    kept_K: jax.Array,
    removed_R: jax.Array,
    gram_II: jax.Array,
    sums_I: jax.Array,
    count: jax.Array,
    ridge: float,
    centered: bool,
) -> tuple[jax.Array, jax.Array]:
    """Solve the least-squares problem, and return the changes of the kept rows [K, O] and of the bias [O]."""
    mean_I = sums_I / jnp.maximum(count, 1.0)
    if centered:
        gram_II = gram_II - jnp.outer(mean_I, sums_I)
    own_KK, other_KR = gram_II[kept_K][:, kept_K], gram_II[kept_K][:, removed_R]
    size_K = jnp.sqrt(jnp.maximum(jnp.diagonal(own_KK), 0.0))
    scale_K = jnp.where(size_K > 0, 1.0 / jnp.where(size_K > 0, size_K, 1.0), 0.0)
    # With a diagonal of ones, the ridge is relative to each input, whatever the largest input is.
    scaled_KK = own_KK * scale_K[:, None] * scale_K + jnp.diag(ridge + (scale_K == 0))
    with jax.default_matmul_precision("highest"):
        target_KO = scale_K[:, None] * (other_KR @ w_IO[removed_R])
        factor = jax.scipy.linalg.cho_factor(scaled_KK, lower=True)
        solved_KO = jax.scipy.linalg.cho_solve(factor, target_KO)
        # One step of iterative refinement removes most of float32's rounding error.
        solved_KO += jax.scipy.linalg.cho_solve(factor, target_KO - scaled_KK @ solved_KO)
        added_KO = scale_K[:, None] * solved_KO
        added_KO = jnp.where(jnp.all(jnp.isfinite(added_KO)), added_KO, 0.0)
        return added_KO, mean_I[removed_R] @ w_IO[removed_R] - mean_I[kept_K] @ added_KO
