"""Run a stack of layers and return the outputs of selected layers, for losses on hidden states (distillation, probes).

The `lax.scan` over layers carries a buffer with n + 1 entries. Each selected layer has one entry. All other layers
overwrite the last entry. The memory therefore depends on n, and not on the number of layers.

Shapes: B batch, T sequence, D model width, L layers, n selected layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.distributed import mesh as meshes
from llmctl.model.attention import Shared

Tree = Any
Layer = Callable[..., jax.Array]
"""Function that applies one layer to an input [B, T, D], and returns the output [B, T, D].

The arguments are the layer's parameters, the input, the inputs that all layers share, and further inputs of this layer.
"""


def run(
    layer: Layer, params: Tree, own: tuple[Tree, ...], x_BTD: jax.Array, shared: Shared, layers: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Run a stack of layers, and return the outputs of the last layer and of selected layers.

    Args:
        layer: Function that applies one layer (see `Layer`).
        params: Layer parameters with a leading axis of layers [L, ...].
        own: Further inputs that differ per layer, such as dropout keys, with the same leading axis.
        x_BTD: Input of the first layer.
        shared: Inputs that all layers share, such as masks.
        layers: Indices of the layers whose outputs are kept, each at most once. -1 keeps the input of the first layer.

    Returns:
        Output of the last layer [B, T, D], and the outputs of the n selected layers [n, B, T, D]. The selected layers
        have the order of `layers`.

    Raises:
        RequestError: If an index is not a layer or is given twice, or if the mesh has a pipeline.
    """
    depth, n = len(own[0]), len(layers)
    if meshes.axis_size("pipeline") > 1:
        raise RequestError(
            "hidden states of chosen layers need mesh.pipeline = 1: its stages keep no outputs of layers"
        )
    if len(set(layers)) < n or not set(layers) <= set(range(-1, depth)):
        raise RequestError(f"layers {list(layers)} are not different layers of a stack of {depth} (0 is the first)")
    slot_of = {layer: slot for slot, layer in enumerate(layers)}
    slot_L = np.array([slot_of.get(layer, n) for layer in range(depth)])

    def body(carry: tuple[jax.Array, jax.Array], each: Tree) -> tuple[tuple[jax.Array, jax.Array], None]:
        x_BTD, kept = carry
        here, its_own, slot = each
        x_BTD = layer(here, x_BTD, shared, *its_own)
        kept = jax.lax.dynamic_update_index_in_dim(kept, x_BTD, slot, axis=0)
        return (x_BTD, meshes.constrain(kept, None, "batch", "seq", "act_embed")), None

    kept = jnp.zeros((n + 1, *x_BTD.shape), x_BTD.dtype)
    start = (x_BTD, kept.at[slot_of[-1]].set(x_BTD) if -1 in slot_of else kept)
    (x_BTD, kept), _ = jax.lax.scan(body, start, (params, own, jnp.asarray(slot_L)))
    return x_BTD, kept[:n]
