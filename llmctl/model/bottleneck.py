"""Bottleneck adapters of a layer: small networks that finetuning trains beside a frozen model.

- sequential: y + scale * expand(gelu(reduce(y))), y the output of a sublayer before its residual sum (Houlsby et al.,
  2019, arXiv:1902.00751). Attention, cross-attention and the feed-forward layer each have one.
- parallel: feed_forward(x) + scale * expand(relu(reduce(x))) (He et al., 2022, arXiv:2110.04366).

The nonlinearities are those of the authors' code. `expand` starts at zero, so a new adapter changes nothing.
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
    """Adapter x [..., D] -> what it adds [..., D]."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        h = Dense(cfg.adapter_size, ("embed", "norm"), True, self.dtype, name="reduce")(x)
        h = ACTIVATIONS[ACTIVATION[cfg.adapter_form]](h)
        y = Dense(cfg.d_model, ("norm", "embed"), True, self.dtype, 0.0, name="expand")(h)
        return jnp.asarray(cfg.adapter_scale, y.dtype) * y
