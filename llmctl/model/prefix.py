"""Define the trained prefix of prefix tuning: additional keys and values, to which all tokens attend (Li and Liang,
2021, arXiv:2101.00190).

Each decoder layer has P trained keys and values for self-attention. If a model has no decoder, each encoder layer has P
trained keys and values. Every token attends to all trained keys, even in layers with a sliding window. The trained keys
have no rotary positions and no norm. The positions of the text begin at P. The library PEFT implements prefix tuning in
the same way.

Shapes: B batch, P trained keys, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmctl.model.config import ModelConfig

DEVIATION = 0.02
"""Standard deviation of randomly initialized keys and values."""


def added(cfg: ModelConfig, tokens: int) -> dict[str, int]:
    """Return the config fields that change when a prefix of `tokens` keys and values is added, with their new values.

    The prefix takes the first `tokens` positions, so the maximum length of texts decreases by `tokens`. If positions
    are relative or absent, the maximum length does not change.
    """
    return {"prefix_tokens": tokens, "max_seq_len": cfg.max_seq_len - (0 if _unbounded(cfg) else tokens)}


def removed(cfg: ModelConfig) -> dict[str, int]:
    """Return the config fields that change when the prefix is removed, with their new values; inverse of `added`."""
    return {"prefix_tokens": 0, "max_seq_len": cfg.max_seq_len + (0 if _unbounded(cfg) else cfg.prefix_tokens)}


def _unbounded(cfg: ModelConfig) -> bool:
    return cfg.positions in ("relative", "none")


class Prefix(nn.Module):
    """Store the trained keys and values of one layer, [P, G * K] each."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, rows: int) -> tuple[jax.Array, jax.Array]:
        """Return the trained keys and values, repeated for a batch of `rows` rows, [B, P, G, K] each."""
        cfg = self.config
        P, G, K = cfg.prefix_tokens, cfg.kv_heads, cfg.head_dim

        def part(name: str) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(DEVIATION), (None, "kv_heads"))
            w = self.param(name, init, (P, G * K), unbox=True)
            return jnp.broadcast_to(w.astype(self.dtype).reshape(P, G, K), (rows, P, G, K))

        return part("k"), part("v")
