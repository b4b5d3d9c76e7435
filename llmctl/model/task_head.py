"""Define task heads, which map the final hidden states to the outputs of a task, such as logits of classes.

Shapes: B batch, T sequence, D model width, C classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmctl.model.config import ModelConfig
from llmctl.model.layers import Dense


def pool(x_BTD: jax.Array, segments_BT: jax.Array, pooling: str, order_BT: jax.Array | None = None) -> jax.Array:
    """Reduce each sequence to one vector [B, D].

    Args:
        x_BTD: Hidden states.
        segments_BT: Number of the packed text that each token belongs to; 0 is padding.
        pooling: "last" (last token), "mean" (over tokens) or "first" (first token), all without padding.
        order_BT: Index of each token in the original sequence, if context parallelism permutes the tokens. The first
            token stays first.
    """
    real_BT = segments_BT > 0
    if pooling == "first":
        return x_BTD[:, 0]
    if pooling == "last":
        places = jnp.arange(real_BT.shape[1]) if order_BT is None else order_BT
        last_B = jnp.argmax(jnp.where(real_BT, places, -1), axis=1)
        return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    total = jnp.sum(jnp.where(real_BT[..., None], x_BTD, 0), axis=1, dtype=jnp.float32)
    return (total / jnp.maximum(real_BT.sum(axis=1), 1)[:, None]).astype(x_BTD.dtype)


def pool_segments(x_BTD: jax.Array, segments_BT: jax.Array, pooling: str, count: int) -> jax.Array:
    """Reduce each text of a packed row to one vector, as `pool` does for a row with one text.

    The result is [B, E, D] for E texts per row.

    Args:
        x_BTD: Hidden states.
        segments_BT: Number of the packed text that each token belongs to, from 1 to E; 0 is padding.
        pooling: "last", "mean" or "first" (see `pool`).
        count: Number of segments per row, E. Segments without tokens get arbitrary vectors.
    """
    member_BET = segments_BT[:, None, :] == jnp.arange(1, count + 1)[:, None]
    if pooling == "mean":
        weight_BET = member_BET / jnp.maximum(member_BET.sum(-1, keepdims=True), 1)
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("bet,btd->bed", weight_BET, x_BTD.astype(jnp.float32), precision=exact).astype(x_BTD.dtype)
    at_BE = jnp.argmax(member_BET, -1)
    if pooling == "last":
        at_BE = member_BET.shape[-1] - 1 - jnp.argmax(member_BET[..., ::-1], -1)
    return jnp.take_along_axis(x_BTD, at_BE[..., None], axis=1)


class TaskHead(nn.Module):
    """Compute the outputs of a task head in float32.

    Shapes: classify [B, C], regress [B], tokens [B, T, C], span [B, T, 2], embed [B, D] with unit length.

    A language model has a task head only for next-sentence prediction, as in BERT. The outputs of this head are [B, 2],
    and class 0 means that the second passage follows the first.
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array, order_BT: jax.Array | None = None) -> jax.Array:
        cfg, kind = self.config, self.config.head_kind
        x = x_BTD if kind.per_token else pool(x_BTD, segments_BT, cfg.pooling, order_BT)
        if cfg.pools:
            pooled = jnp.tanh(Dense(cfg.d_model, ("embed", "norm"), True, self.dtype, name="pooler")(x))
            x = x if kind.bare else pooled  # an embedding model keeps its pooler but does not use it
        if kind.bare:
            x = x.astype(jnp.float32)
            return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        y = Dense(cfg.head_width, ("embed", "labels"), cfg.head_bias, self.dtype, name="out")(x).astype(jnp.float32)
        return y[..., 0] if kind.scalar else y
