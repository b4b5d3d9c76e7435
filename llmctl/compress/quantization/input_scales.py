"""Choose a scale for each input of a matrix that reduces the error of quantized weights or activations.

The scales are moved into the module before the matrix (`llmctl.compress.quantization.folding`).

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llmctl.compress.quantization import grids
from llmctl.compress.quantization.folding import Fold
from llmctl.compress.quantization.grids import Grid

STEPS = 20
"""Number of exponents above 0 that AWQ tries, up to 1, as in the authors' code."""


@partial(jax.jit, static_argnames=("at", "grid", "group"))
def awq(
    kernels: tuple[jax.Array, ...], gram_II: jax.Array, *, at: Fold, grid: Grid, group: int
) -> tuple[jax.Array, jax.Array]:
    """Return AWQ's scales [I] of matrices with the same inputs, and the exponent that gave them.

    (Lin et al., 2023, arXiv:2306.00978.) The scales are m^a: m is the root of the mean square of each input, and the
    exponent a is that with the least squared error of the rounded matrices' outputs. The exponent 0 changes nothing.
    The paper takes the mean absolute value; the mean square is already in the Gram matrix, whose products also give
    the error of the outputs.

    Args:
      kernels: the matrices [I, O].
      gram_II: Gram matrix of their inputs.
      at: where the scales are moved.
      grid: levels of the format.
      group: number of inputs with one scale of the format; 0 for all inputs.
    """
    size_I = jnp.sqrt(at.shared(jnp.diagonal(gram_II), jnp.mean))
    live_I = size_I > 0

    def scales(exponent: jax.Array) -> jax.Array:
        scale_I = jnp.where(live_I, size_I, 1.0) ** exponent
        low = jnp.min(jnp.where(live_I, scale_I, jnp.inf))
        high = jnp.max(jnp.where(live_I, scale_I, 0.0))
        return jnp.where(live_I, scale_I / jnp.sqrt(low * high), 1.0)

    def error(exponent: jax.Array) -> jax.Array:
        scale_I1, total = scales(exponent)[:, None], jnp.float32(0)
        for w in kernels:
            w_IO = w.astype(jnp.float32)
            new_IO = w_IO * scale_I1
            scale_IO = grids.spread(grids.scales(new_IO, grid, group, w.dtype, None, False), len(w_IO))
            lost_IO = grid.level(new_IO, scale_IO) * scale_IO / scale_I1 - w_IO
            total += jnp.sum(lost_IO * jnp.matmul(gram_II, lost_IO, precision=jax.lax.Precision.HIGHEST))
        return total

    exponents = jnp.arange(STEPS + 1) / STEPS
    best = exponents[jnp.argmin(jax.lax.map(error, exponents))]
    good = jnp.isfinite(scales(best)).all() & live_I.any()
    return jnp.where(good, scales(best), 1.0), jnp.where(good, best, 0.0)


@partial(jax.jit, static_argnames=("at",))
def smooth(kernels: tuple[jax.Array, ...], peak_I: jax.Array, alpha: float, *, at: Fold) -> jax.Array:
    """Return SmoothQuant's scales [I] of matrices with the same inputs (Xiao et al., 2022, arXiv:2211.10438).

    A scale is max|x|^alpha / max|w|^(1 - alpha). Activations are divided by it, so outliers move from activations to
    weights. Inputs without activations or weights get the scale 1.

    Args:
      kernels: the matrices [I, O].
      peak_I: largest magnitude of each input.
      alpha: migration strength, from 0 to 1.
      at: where the scales are moved.
    """
    peak_I = at.shared(peak_I, jnp.max)
    weight_I = jnp.max(jnp.stack([jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1) for w in kernels]), axis=0)
    weight_I = at.shared(weight_I, jnp.max)
    live_I = (peak_I > 0) & (weight_I > 0) & jnp.isfinite(peak_I)
    scale_I = jnp.where(live_I, peak_I, 1.0) ** alpha / jnp.where(live_I, weight_I, 1.0) ** (1 - alpha)
    return jnp.where(live_I, jnp.clip(scale_I, 1e-5, 1e5), 1.0)
