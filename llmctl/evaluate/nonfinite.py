"""Find the layer of a model whose outputs are the first that are not finite numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.data import device_batches
from llmctl.distributed import host_arrays
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.setup import Batch, Setup
from llmctl.model import functional
from llmctl.model.config import ModelConfig

READ = ("tokens", "segments", "positions", "types", "branches")
"""Names of the batch arrays that the layers read; an encoder also reads those with the prefix "encoder_"."""


def first_layer(model: ModelConfig, params: functional.Params, batch: Batch, setup: Setup) -> str:
    """Name the first layer with outputs that are not finite, for error messages.

    Padding is ignored. The layers are those of the decoder or, if there is none, of the encoder.

    Args:
        model: Config of the model.
        params: Parameters of the model.
        batch: Host batch whose outputs are not finite, preferably one row: the outputs of all layers are stored.
        setup: Settings of the measurement.
    """
    names = [*READ, *(f"encoder_{name}" for name in READ)]
    inputs = device_batches.place({k: batch[k] for k in names if k in batch}, setup.mesh, reading_order=True)
    if meshes.axis_size("pipeline") > 1:
        return "a mesh without pipeline would tell the layer"
    if (where := _first(model, params, inputs, setup.dtype)) is None:
        return "the layers' outputs are finite, so the output head makes it"
    return f"the first layer with such outputs is {where}"


def _first(model: ModelConfig, params: functional.Params, inputs: Batch, dtype: str) -> str | None:
    stack = "encoder" if model.architecture == "encoder" else "decoder"

    @jax.jit
    def finite(params: functional.Params, inputs: Batch) -> jax.Array:
        layers = range(-1, functional.depth(model, stack))
        _, states_nBTD = functional.hidden_states(model, params, inputs, list(layers), dtype=dtype)
        real_BT = inputs["segments"] > 0
        return jnp.all(jnp.isfinite(states_nBTD) | ~real_BT[..., None], axis=(1, 2, 3))

    wrong = np.flatnonzero(~host_arrays.read(finite(params, inputs)))
    if not len(wrong):
        return None
    return "the embedding" if wrong[0] == 0 else f"layer {wrong[0] - 1} of the {stack} (counted from 0)"
