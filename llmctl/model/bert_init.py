"""How an encoder of BERT's kind begins: its first layer looks for equal tokens.

Whether a passage follows another shows in the words that both have. From random queries and keys attention is a plain
mean at first, and the smallest BERTs do not find out in millions of tokens that they could compare. Here queries equal
keys, are sharp, and do not see which passage a token is of; and a token's embedding outweighs its place. So attention
goes to equal tokens of either passage from the first step, and what it brings back tells of which. To begin as trained
networks look is mimetic initialization (arXiv:2305.09828).

Shapes: L layers, D model width, H query heads, G key heads, R = H / G, K head width, U segment types but one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.model.config import ModelConfig

SHARES = {"tokens": 5.0, "positions": 0.25, "types": 3.5}
"""Factors on the embeddings' initial deviation of 0.02; the norm after their sum sees but the proportions."""
SHARPNESS = 2.5
"""Factor on the first layer's queries and keys: equal tokens must stand out among hundreds of others."""


def suits(cfg: ModelConfig) -> bool:
    """Whether a fresh network begins like this: encoders with a table of positions (BERT, RoBERTa)."""
    return cfg.architecture == "encoder" and cfg.positions == "learned"


def begin(cfg: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Fresh parameters of which the embeddings and the first layer's queries and keys are as said above."""
    embed = {name: value * SHARES[name] if name in SHARES else value for name, value in params["embed"].items()}
    blocks = params["encoder"]["blocks"]
    attention = blocks["attn"]
    q, k = attention["q"], attention["k"]
    queries_DI = SHARPNESS * _blind(q["kernel"][0], params["embed"].get("types"))
    keys_DGK = queries_DI.reshape(cfg.d_model, cfg.heads, cfg.head_dim)[:, :: cfg.heads // cfg.kv_heads]
    alike = {
        "q": q | {"kernel": q["kernel"].at[0].set(queries_DI)},
        "k": k | {"kernel": k["kernel"].at[0].set(keys_DGK.reshape(cfg.d_model, -1))},
    }
    encoder = params["encoder"] | {"blocks": blocks | {"attn": attention | alike}}
    return params | {"embed": embed, "encoder": encoder}


def _blind(kernel_DI: jax.Array, types_UD: jax.Array | None) -> jax.Array:
    """The kernel without what it makes of the difference between segment types, as a LayerNorm passes it on."""
    if types_UD is None or len(types_UD) < 2:
        return kernel_DI
    apart_UD = types_UD[1:] - types_UD[0]
    apart_UD = apart_UD - apart_UD.mean(axis=1, keepdims=True)
    basis_DU, _ = jnp.linalg.qr(apart_UD.T)
    return kernel_DI - basis_DU @ (basis_DU.T @ kernel_DI)
