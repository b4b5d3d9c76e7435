"""How an encoder of BERT's kind begins: its first layer looks for equal tokens.

Whether a passage follows another shows in the words that both have. From random queries and keys attention is a plain
mean at first, and the smallest BERTs do not find out in millions of tokens that they could compare. From queries that
equal keys, and embeddings in which the token outweighs its place, attention goes to equal tokens from the first step,
and there is something to learn from. To begin as trained networks look is mimetic initialization (arXiv:2305.09828).

Shapes: L layers, D model width, H query heads, G key heads, R = H / G, K head width.
"""

from __future__ import annotations

from typing import Any

from llmctl.model import ModelConfig

SHARES = {"tokens": 5.0, "positions": 0.25, "types": 2.5}
"""Factors on the embeddings' initial deviation of 0.02; the norm after their sum sees but the proportions."""


def suits(cfg: ModelConfig) -> bool:
    """Whether a fresh network begins like this: encoders with a table of positions (BERT, RoBERTa)."""
    return cfg.architecture == "encoder" and cfg.positions == "learned"


def begin(cfg: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Fresh parameters with the first layer's keys equal to its queries, and the embeddings in those shares."""
    embed = {name: value * SHARES[name] if name in SHARES else value for name, value in params["embed"].items()}
    blocks = params["encoder"]["blocks"]
    attention = blocks["attn"]
    keys_LDI = attention["k"]["kernel"]
    queries_DHK = attention["q"]["kernel"][0].reshape(cfg.d_model, cfg.heads, cfg.head_dim)
    R = cfg.heads // cfg.kv_heads
    first_DI = queries_DHK[:, ::R].reshape(keys_LDI.shape[1:])
    alike = attention | {"k": attention["k"] | {"kernel": keys_LDI.at[0].set(first_DI)}}
    encoder = params["encoder"] | {"blocks": blocks | {"attn": alike}}
    return params | {"embed": embed, "encoder": encoder}
