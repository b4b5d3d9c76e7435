"""Define bottleneck adapters: small networks in each layer, which finetuning trains while the other weights are frozen.

- sequential: y + scale * expand(gelu(reduce(y))), for the output y of a sublayer before its residual sum (Houlsby et
  al., 2019, arXiv:1902.00751). Attention, cross-attention and the feed-forward layer have one adapter each.
- parallel: feed_forward(x) + scale * expand(relu(reduce(x))) (He et al., 2022, arXiv:2110.04366). Only the feed-forward
  layer has an adapter.

The nonlinearities are those of the authors' code. `expand` is initialized with zeros, so a new adapter does not change
the model's outputs.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmctl.model.config import ModelConfig
from llmctl.model.layers import ACTIVATIONS, Dense

ACTIVATION = {"sequential": "gelu", "parallel": "relu"}


class Bottleneck(nn.Module):
    """Compute scale * expand(activation(reduce(x))) [..., D] from x [..., D], to be added to a sublayer's output."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        h = Dense(cfg.adapter_size, ("embed", "norm"), True, self.dtype, name="reduce")(x)
        h = ACTIVATIONS[ACTIVATION[cfg.adapter_form]](h)
        y = Dense(cfg.d_model, ("norm", "embed"), True, self.dtype, 0.0, name="expand")(h)
        return jnp.asarray(cfg.adapter_scale, y.dtype) * y
