"""Find the first layer of a model with outputs that are not finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmctl.config.errors import WorkError
from llmctl.data import device_batches
from llmctl.distributed import host_arrays
from llmctl.distributed import mesh as meshes
from llmctl.model import functional
from llmctl.model.config import ModelConfig

Batch = dict[str, Any]

Inputs = Callable[[Batch], Batch]
"""Function that returns the arrays that the network reads, such as `model_inputs` of a task."""


def first_layer(
    model: ModelConfig, params: functional.Params, batch: Batch, mesh: Mesh, dtype: str, inputs: Inputs | None = None
) -> str:
    """Name the first layer with outputs that are not finite, for error messages.

    Padding is ignored. The layers are those of the decoder or, if there is none, of the encoder.

    Args:
        model: Config of the model.
        params: Parameters of the model.
        batch: Host batch whose outputs are not finite, preferably one row: the outputs of all layers are stored.
        mesh: The device mesh.
        dtype: Dtype of the computation.
    """
    if meshes.axis_size("pipeline") > 1:
        return "a mesh without pipeline would tell the layer"
    placed = device_batches.place({k: a for k, a in batch.items() if a.dtype.kind in "iuf"}, mesh, reading_order=True)
    if (where := _first(model, params, placed, dtype, inputs or (lambda batch: batch))) is None:
        return "the layers' outputs are finite, so the output head makes it"
    return f"the first layer with such outputs is {where}"


def check(
    model: ModelConfig,
    params: functional.Params,
    batch: Batch,
    y: np.ndarray,
    real: np.ndarray,
    mesh: Mesh,
    dtype: str,
    inputs: Inputs | None = None,
) -> None:
    """Check that outputs of a model are finite.

    Args:
        model: Config of the model.
        params: Parameters of the model.
        batch: Host batch of B rows.
        y: Outputs [B, ...].
        real: Mask of the outputs to check. Its axes are the first axes of `y`.
        mesh: The device mesh.
        dtype: Dtype of the computation.
        inputs: Function from the batch to the arrays that the network reads (see `first_layer`).

    Raises:
        WorkError: If an output is not finite. The message names the first layer with such outputs.
    """
    if y.dtype.kind != "f":
        return
    wrong = ~np.isfinite(np.asarray(y, np.float32)) & real.reshape(*real.shape, *[1] * (y.ndim - real.ndim))
    if wrong.any():
        row = int(np.flatnonzero(wrong.reshape(len(y), -1).any(1))[0])
        layer = first_layer(model, params, {name: a[row : row + 1] for name, a in batch.items()}, mesh, dtype, inputs)
        raise WorkError(f"the model gives an output that is not a finite number; {layer}")


def _first(model: ModelConfig, params: functional.Params, batch: Batch, dtype: str, read: Inputs) -> str | None:
    stack = "encoder" if model.architecture == "encoder" else "decoder"

    @jax.jit
    def finite(params: functional.Params, batch: Batch) -> jax.Array:
        inputs = read(batch)
        layers = range(-1, functional.depth(model, stack))
        _, states_nBTD = functional.hidden_states(model, params, inputs, list(layers), dtype=dtype)
        real_BT = inputs["segments"] > 0
        return jnp.all(jnp.isfinite(states_nBTD) | ~real_BT[..., None], axis=(1, 2, 3))

    wrong = np.flatnonzero(~host_arrays.read(finite(params, batch)))
    if not len(wrong):
        return None
    return "the embedding" if wrong[0] == 0 else f"layer {wrong[0] - 1} of the {stack} (counted from 0)"
