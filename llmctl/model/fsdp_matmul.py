"""Multiply activations by a weight that is sharded by FSDP.

The weight is gathered once in the forward pass and once in the backward pass. The gradient of the weight is computed by
a reduce-scatter. Without this module, XLA would gather the weight twice in the backward pass. The first of these
gathers would be for the recomputation of the forward pass, and the second for the product.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.distributed import mesh as meshes

Axes = tuple[str, str]


def splits(axes: Axes) -> bool:
    """Return True if `matmul` applies to a weight with these logical axes.

    The function applies if the current mesh shards the weight by FSDP. With context parallelism, however, XLA gathers
    the weight without this module.
    """
    mesh = meshes.current()
    if mesh is None or meshes.splits_sequences() or "embed" not in axes:
        return False
    return any(mesh.shape[axis] > 1 for axis in meshes.RULES["embed"])


def _whole(w_IO: jax.Array, axes: Axes) -> jax.Array:
    return meshes.constrain(w_IO, *(None if name == "embed" else name for name in axes))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, w_IO: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """Compute x [..., I] @ w [I, O] in `dtype`; `axes` are the logical axes of w."""
    return _forward(x, w_IO, axes, dtype)[0]


def _forward(x: jax.Array, w_IO: jax.Array, axes: Axes, dtype: Any) -> Any:
    return jnp.matmul(x.astype(dtype), _whole(w_IO.astype(dtype), axes)), (x, w_IO)


def _backward(
    axes: Axes, dtype: Any, saved: tuple[jax.Array, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w_IO = saved
    rows = tuple(range(x.ndim - 1))
    d_x = jax.lax.dot_general(d_y, _whole(w_IO.astype(dtype), axes), (((d_y.ndim - 1,), (1,)), ((), ())))
    d_w = jax.lax.dot_general(x.astype(dtype), d_y, ((rows, rows), ((), ())))
    return d_x.astype(x.dtype), meshes.constrain(d_w, *axes).astype(w_IO.dtype)


matmul.defvjp(_forward, _backward)
