"""Initialize BERT-style encoders so that equal tokens attend to each other in the first layer.

To decide whether one passage follows another, a network compares the words that both contain. With random queries and
keys, attention is a uniform mean at first. The smallest BERTs do not learn to compare tokens within millions of tokens.

Here the first layer's keys equal its queries. Both are scaled up and ignore the segment type. Token embeddings are
larger than position embeddings. Attention therefore finds equal tokens in both passages from the first step, and its
output contains their segment type. Initialization with the structure of trained networks is called mimetic (Trockman
and Kolter, 2023, arXiv:2305.09828).

Shapes: L layers, D model width, H query heads, G key heads, R = H / G, K head width, U segment types minus one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.model.config import ModelConfig

SHARES = {"tokens": 5.0, "positions": 0.25, "types": 3.5}
"""Factors on the embeddings' initial standard deviation of 0.02. A norm follows their sum, so only the ratios
matter."""
SHARPNESS = 2.5
"""Factor on the first layer's queries and keys. It gives equal tokens the largest scores among hundreds of others."""


def applies_to(cfg: ModelConfig) -> bool:
    """Return True if this initialization is used for new models with the config `cfg`.

    These are encoders with learned positions, such as BERT and RoBERTa.
    """
    return cfg.architecture == "encoder" and cfg.positions == "learned"


def initialize(cfg: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Return new parameters with this initialization.

    Embeddings are rescaled, and the first layer gets new queries and keys.
    """
    embed = {name: value * SHARES[name] if name in SHARES else value for name, value in params["embed"].items()}
    blocks = params["encoder"]["blocks"]
    attention = blocks["attn"]
    q, k = attention["q"], attention["k"]
    queries_DI = SHARPNESS * _without_type_response(q["kernel"][0], params["embed"].get("types"))
    keys_DGK = queries_DI.reshape(cfg.d_model, cfg.heads, cfg.head_dim)[:, :: cfg.heads // cfg.kv_heads]
    alike = {
        "q": q | {"kernel": q["kernel"].at[0].set(queries_DI)},
        "k": k | {"kernel": k["kernel"].at[0].set(keys_DGK.reshape(cfg.d_model, -1))},
    }
    encoder = params["encoder"] | {"blocks": blocks | {"attn": attention | alike}}
    return params | {"embed": embed, "encoder": encoder}


def _without_type_response(kernel_DI: jax.Array, types_UD: jax.Array | None) -> jax.Array:
    """Return a kernel [D, I] whose products with LayerNorm outputs do not depend on the segment type.

    The components of its columns along the differences between the centered type embeddings are removed.
    """
    if types_UD is None or len(types_UD) < 2:
        return kernel_DI
    apart_UD = types_UD[1:] - types_UD[0]
    apart_UD = apart_UD - apart_UD.mean(axis=1, keepdims=True)
    basis_DU, _ = jnp.linalg.qr(apart_UD.T)
    return kernel_DI - basis_DU @ (basis_DU.T @ kernel_DI)
