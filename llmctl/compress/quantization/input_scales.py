"""Choose a scale for each input of a matrix, so that quantization has a smaller error (AWQ, SmoothQuant).

The scales are folded into the module before the matrix (`llmctl.compress.quantization.folding`).

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llmctl.compress.quantization import grids
from llmctl.compress.quantization.folding import Fold
from llmctl.compress.quantization.levels import Grid

STEPS = 20
"""Number of steps between the exponents 0 and 1 that AWQ tries, as in the authors' code."""


@partial(jax.jit, static_argnames=("at", "levels"))
def awq(
    kernels: tuple[jax.Array, ...], gram_II: jax.Array, *, at: Fold, levels: tuple[tuple[Grid, int], ...]
) -> tuple[jax.Array, jax.Array]:
    """Return AWQ's scales [I] for matrices with the same inputs, and the exponent of the scales.

    In AWQ (Lin et al., 2023, arXiv:2306.00978), the scale of an input is m^a, for the root mean square m of the input.
    All inputs have the same exponent a, which minimizes the squared error of the rounded matrices' outputs. With the
    exponent 0, all scales are 1. The paper uses the mean absolute value in place of m. This code uses the root mean
    square, because the Gram matrix contains it.

    Args:
      kernels: the matrices [I, O] that are quantized.
      gram_II: Gram matrix of the inputs.
      at: the matrices, and the module into which the scales are folded.
      levels: for each matrix, the levels of its format and the number of inputs per scale; 0 for one scale per output.
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
        for w, (grid, group) in zip(kernels, levels, strict=True):
            w_IO = w.astype(jnp.float32)
            new_IO = w_IO * scale_I1
            scale_IO = grids.spread(grids.scales(new_IO, grid, group, w.dtype, None, False), len(w_IO))
            lost_IO = grid.round(new_IO, scale_IO) / scale_I1 - w_IO
            total += jnp.sum(lost_IO * jnp.matmul(gram_II, lost_IO, precision=jax.lax.Precision.HIGHEST))
        return total

    exponents = jnp.arange(STEPS + 1) / STEPS
    best = exponents[jnp.argmin(jax.lax.map(error, exponents))]
    good = jnp.isfinite(scales(best)).all() & live_I.any()
    return jnp.where(good, scales(best), 1.0), jnp.where(good, best, 0.0)


@partial(jax.jit, static_argnames=("at",))
def smooth(kernels: tuple[jax.Array, ...], peak_I: jax.Array, alpha: float, *, at: Fold) -> jax.Array:
    """Return SmoothQuant's scales [I] of matrices with the same inputs (Xiao et al., 2022, arXiv:2211.10438).

    A scale is max|x|^alpha / max|w|^(1 - alpha). Activations are divided by the scale, so outliers move from
    activations to weights. Inputs whose activations or weights are all 0 get the scale 1.

    Args:
      kernels: the matrices [I, O] that are quantized.
      peak_I: largest magnitude of each input.
      alpha: migration strength, from 0 to 1.
      at: the matrices, and the module into which the scales are folded.
    """
    peak_I = at.shared(peak_I, jnp.max)
    weight_I = jnp.max(jnp.stack([jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1) for w in kernels]), axis=0)
    weight_I = at.shared(weight_I, jnp.max)
    live_I = (peak_I > 0) & (weight_I > 0) & jnp.isfinite(peak_I)
    scale_I = jnp.where(live_I, peak_I, 1.0) ** alpha / jnp.where(live_I, weight_I, 1.0) ** (1 - alpha)
    return jnp.where(live_I, jnp.clip(scale_I, 1e-5, 1e5), 1.0)
