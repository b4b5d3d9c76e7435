"""Measure the error of a changed matrix's outputs on the calibration inputs, from the Gram matrix of the inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.distributed import mesh


@jax.jit
def output_error(gram_II: jax.Array, before_IO: jax.Array, after_IO: jax.Array) -> jax.Array:
    """Return ||X after - X before|| / ||X before|| in the Frobenius norm, from the Gram matrix of the inputs X."""
    before_IO = before_IO.astype(jnp.float32)
    lost_IO = after_IO.astype(jnp.float32) - before_IO

    def square(w_IO: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.sum(w_IO * jnp.matmul(gram_II, w_IO, precision=jax.lax.Precision.HIGHEST)), 0.0)

    whole = square(before_IO)
    return jnp.sqrt(square(lost_IO) / jnp.where(whole > 0, whole, 1.0))


def rounded_error(gram_II: jax.Array, before_IO: jax.Array, after_IO: jax.Array) -> float:
    """Return `output_error` as a Python float, rounded to six decimals for reports."""
    return round(float(output_error(gram_II, before_IO, after_IO)), 6)


def replicated(a: Any) -> Any:
    """Replicate an array on all devices of the current mesh. Without a mesh, return the array unchanged.

    Methods that read a Gram matrix replicate their arguments. Every device then computes the complete result, so the
    result does not depend on the mesh.
    """
    current = mesh.current()
    return a if current is None else jax.device_put(a, mesh.replicated(current))
