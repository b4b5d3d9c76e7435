"""Compute T5's relative position bias: one learned number per head and bucket of distances, added to the scores (Raffel
et al., 2019, arXiv:1910.10683).

Shapes: T queries, S keys, H query heads, U buckets.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmctl.model.attention import Shared, distances, position_differences
from llmctl.model.config import ModelConfig


class RelativeBias(nn.Module):
    """Define the table of relative position biases [U, H], one parameter that all layers share."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        cfg = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("norm", "heads"))
        return self.param("table", init, (cfg.relative_buckets, cfg.heads), unbox=True)


def add(
    shared: Shared,
    table_UH: jax.Array,
    cfg: ModelConfig,
    *,
    causal: bool,
    slot: jax.Array | int | None,
    order_BT: jax.Array | None,
    positions_BT: jax.Array,
) -> Shared:
    """Add the relative position bias [H, T, S] to the inputs that all layers share, and return these inputs.

    For a model with P trained keys (prefix tuning), also add the bias [H, T, P] of these keys. The positions of these
    keys are before the text. For ring attention, which computes the bias block by block, add the bias table [U, H]
    instead.

    Args:
        shared: Shared inputs of the layers.
        table_UH: Bias table.
        cfg: Config of the model.
        causal: Whether tokens attend to earlier tokens only.
        slot: Position of the first token in the key-value cache, a scalar or one position per row [B]. None without a
            cache.
        order_BT: Index of each token in the original sequence, if context parallelism permutes the tokens.
        positions_BT: Position of each token in its segment, which is read if segments have branches.
    """
    if shared.mask_BTS is None:
        return shared._replace(bias_table_UH=table_UH)

    def bias(distance_TS: jax.Array) -> jax.Array:
        return jnp.moveaxis(table_UH.astype(jnp.float32)[bucket_of(cfg, not causal, distance_TS)], -1, -3)

    distance_TS = distances(shared.mask_BTS, slot, order_BT)
    if shared.branches_BT is not None:
        distance_TS = position_differences(positions_BT)
    shared = shared._replace(bias_HTS=bias(distance_TS))
    if not cfg.prefix_tokens:
        return shared
    # The first key of the text is in column 0, and the prefix is before it: prefix tuning of models with relative
    # positions refuses packed rows, and decoders, whose prompts are padded on the left.
    return shared._replace(bias_HTP=bias(distance_TS[..., :1] + jnp.arange(-cfg.prefix_tokens, 0)))


def bucket_of(cfg: ModelConfig, bidirectional: bool, distance: jax.Array) -> jax.Array:
    """Return the bucket of each distance (key position minus query position), int32, for the settings in `cfg`."""
    return relative_bucket(distance, cfg.relative_buckets, cfg.relative_max_distance, bidirectional)


def relative_bucket(distance: jax.Array, buckets: int, max_distance: int, bidirectional: bool) -> jax.Array:
    """Return the bucket of each distance (key position minus query position), int32.

    Short distances have a bucket each. For long distances, the width of the buckets grows logarithmically up to
    `max_distance`. If `bidirectional`, half of the buckets are for later keys; otherwise later keys have bucket 0.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))
