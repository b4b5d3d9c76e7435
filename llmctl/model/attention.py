"""Compute attention: grouped-query self-attention and cross-attention.

The softmax is computed in `attention_xla`. Other modules define optional features: `attention_kernels`,
`ring_attention`, `relative_bias`, `kv_cache` and `prefix`.

A sequence may consist of several packed texts. Each text is a segment, numbered from 1, and attention does not cross
segments. Segment 0 is padding. A slot is one position along the sequence axis of the key-value cache.

A segment may have several continuations of one context, its branches. The context is branch 0, and the continuations
are branches 1, 2 and so on. A token attends to the context and to its own branch only. The context is therefore
computed once for all continuations. The positions of each branch continue those of the context.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, N = R * T, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmctl.distributed import mesh as meshes
from llmctl.distributed.mesh import constrain
from llmctl.model import kv_cache
from llmctl.model.attention_xla import Keys, attend, attend_to_parts
from llmctl.model.compressed_cache import Compressed
from llmctl.model.config import ModelConfig
from llmctl.model.layers import Dense, Norm, residual_scale, rotary_table, rotate
from llmctl.model.prefix import Prefix

PROJECTED = "projected"
"""Name by which rematerialization policies select the projected queries, keys and values (see `jax.ad_checkpoint`)."""

Choose = Callable[..., jax.Array]
"""Function that selects and runs an attention kernel.

Its arguments and its result are those of `attention_kernels.attend`.
"""


class Shared(NamedTuple):
    """Store the attention inputs that all layers of one stack (encoder or decoder) share, such as masks.

    The fields `local_mask_BTS` and `local_rotary` are for layers with a sliding window. `memory_BSD` is the encoder's
    output. Unused fields are None.
    """

    mask_BTS: jax.Array | None
    """Whether a query may attend to a key; None for ring attention, which computes masks from segment numbers."""
    local_mask_BTS: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    local_rotary: tuple[jax.Array, jax.Array] | None = None
    bias_HTS: jax.Array | None = None
    """Additive bias of the attention scores, [H, T, S], or [B, H, T, S] if rows have different cache positions."""
    bias_HTP: jax.Array | None = None
    """Additive bias of the attention scores for the P keys of a trained prefix (prefix tuning); None without one."""
    memory_BSD: jax.Array | None = None
    memory_mask_BTS: jax.Array | None = None
    memory_segments_BS: jax.Array | None = None
    bias_table_UH: jax.Array | None = None
    """Table of the relative position bias [U, H]; only for ring attention, which computes the bias block by block."""
    slot: jax.Array | int | None = None
    """Position in the key-value cache at which the first token is written, a scalar or one per row [B]. None without a
    cache."""
    causal_BT: jax.Array | None = None
    """Segment number of each token, if attention is causal. Fused kernels read this array instead of a mask. None if
    attention is not causal, or if there is a cache."""
    mutual_BT: jax.Array | None = None
    """Segment number of each token, if attention is not causal. Fused kernels read this array instead of a mask. None
    if attention is causal, or if there is a cache."""
    branches_BT: jax.Array | None = None
    """Branch of each token; None if no segment has branches. Only attention with a mask supports branches."""
    rows_B: jax.Array | None = None
    """Index of each sequence in the full batch, if this is a microbatch. Dropout masks depend on this index."""


def visible(segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Return the attention mask [B, T, S], given the segment of each query and of each key.

    An element is true if query and key are in the same segment and the key is not padding.
    """
    return (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)


def position_differences(positions_BT: jax.Array) -> jax.Array:
    """Return the position of each key minus the position of each query, int [B, T, T].

    The result is valid for a key and a query of the same segment. In a row with branches, the result is not the
    difference of the tokens' indices.
    """
    return positions_BT[:, None, :] - positions_BT[:, :, None]


def distances(mask_BTS: jax.Array, slot: jax.Array | int | None, order_BT: jax.Array | None) -> jax.Array:
    """Return the position of each key minus the position of each query.

    The result is int [T, S]. If `slot` has one position per row, the result is [B, T, S].

    Args:
        mask_BTS: Attention mask; only the shape is used.
        slot: Position of the first query in the key-value cache; a scalar, or one position per row [B]. None without a
            cache.
        order_BT: Index of each token in the original sequence, if context parallelism permutes the tokens, otherwise
            None.
    """
    T, S = mask_BTS.shape[1:]
    if order_BT is not None:  # all rows have the same order
        return order_BT[0][None, :] - order_BT[0][:, None]
    distance_TS = jnp.arange(S)[None, :] - jnp.arange(T)[:, None]
    if slot is None:
        return distance_TS
    return distance_TS - (jnp.reshape(slot, (-1, 1, 1)) if jnp.ndim(slot) else slot)


def share(
    cfg: ModelConfig,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    causal: bool,
    cached_BS: jax.Array | None = None,
    slot: jax.Array | int | None = None,
    order_BT: jax.Array | None = None,
    branches_BT: jax.Array | None = None,
) -> Shared:
    """Build the self-attention inputs that all layers of one stack (encoder or decoder) share: masks and rotary tables.

    Args:
        cfg: Config of the model.
        segments_BT: Segment of each token: the number of the packed text that it belongs to; 0 is padding.
        positions_BT: Position of each token in its segment.
        causal: Whether tokens attend to earlier tokens only.
        cached_BS: Segment of the token at each position of the key-value cache; None without a cache.
        slot: Cache position of the first of the T tokens: a scalar, or one position per row [B]. The tokens are stored
            one after the other. None without a cache.
        order_BT: Index of each token in the original sequence, if context parallelism permutes the tokens.
        branches_BT: Branch of each token in its segment; None without branches.
    """
    mask = local = None
    if order_BT is None or not meshes.splits_sequences():
        keys_BS = segments_BT if cached_BS is None else cached_BS
        mask = visible(segments_BT, keys_BS)
        distance_TS = distances(mask, slot, order_BT)
        if causal:
            mask &= distance_TS <= 0
        if branches_BT is not None:
            mask &= (branches_BT[:, None, :] == 0) | (branches_BT[:, None, :] == branches_BT[:, :, None])
            distance_TS = position_differences(positions_BT)
        if cfg.window:
            local = mask & (jnp.abs(distance_TS) < cfg.window)
    rotary = local_rotary = None
    if cfg.positions == "rope":
        rotary = rotary_table(positions_BT, cfg, cfg.rope_theta)
        if cfg.rope_local_theta:
            unscaled = cfg.model_copy(update={"rope_scaling": {}})
            local_rotary = rotary_table(positions_BT, unscaled, cfg.rope_local_theta)
    shared = Shared(mask, local, rotary, local_rotary, slot=slot, rows_B=jnp.arange(len(segments_BT)))
    shared = shared._replace(branches_BT=branches_BT)
    if slot is not None:
        return shared
    return shared._replace(causal_BT=segments_BT) if causal else shared._replace(mutual_BT=segments_BT)


def local_layers(cfg: ModelConfig, layers: int) -> jax.Array:
    """Return whether each layer has local attention (a sliding window), bool [L]."""
    return jnp.asarray(cfg.local_layers(layers) if cfg.window else [False] * layers)


class Attention(nn.Module):
    """Compute self-attention or, if `cross` is set, cross-attention to the encoder's output `shared.memory_BSD`."""

    config: ModelConfig
    dtype: Any
    layers: int
    cross: bool = False
    choose: Choose | None = None
    """Function that selects an attention kernel (`attention_kernels.attend`). If None, attention runs in plain XLA."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, shared: Shared, local: jax.Array) -> jax.Array:
        cfg = self.config
        K, H, G = cfg.head_dim, cfg.heads, cfg.kv_heads
        source_BSD = cast(jax.Array, shared.memory_BSD) if self.cross else x_BTD
        # The scale gives initial scores of about unit variance for any score factor. T5's factor of 1 would saturate
        # the softmax.
        q = self._heads("q", x_BTD, H, "heads", K**-0.5 / (cfg.attn_scale or K**-0.5))
        q = Norm(cfg, self.dtype, name="q_norm")(q) if cfg.qk_norm else q
        k: kv_cache.Cached
        v: kv_cache.Cached
        if self.cross and kv_cache.has_memory(self):
            k, v = (kv_cache.recall(self, f"memory_{name}", len(x_BTD), G, K) for name in "kv")
        else:
            k = self._heads("k", source_BSD, G, "kv_heads")
            v = self._heads("v", source_BSD, G, "kv_heads")
            k = Norm(cfg, self.dtype, name="k_norm")(k) if cfg.qk_norm else k
            if self.cross and shared.slot is not None:  # the memory is constant, so later tokens reuse it
                kv_cache.keep_memory(self, "k", k)
                kv_cache.keep_memory(self, "v", v)
                k, v = (kv_cache.recall(self, f"memory_{name}", len(x_BTD), G, K) for name in "kv")
        if not self.cross and shared.rotary is not None:
            table = _pick(local, shared.local_rotary, shared.rotary)
            q, k = rotate(q, table), rotate(cast(jax.Array, k), table)
        if not self.cross and shared.slot is not None:
            whole_BTS = cast(jax.Array, shared.mask_BTS)
            k, v = (
                kv_cache.remember(self, name, cast(jax.Array, x), shared.slot, self.dtype, whole_BTS)
                for name, x in (("k", k), ("v", v))
            )
        mask = shared.memory_mask_BTS if self.cross else _pick(local, shared.local_mask_BTS, shared.mask_BTS)
        bias_HTS = None if self.cross else shared.bias_HTS
        if cfg.prefix_tokens and not self.cross:
            y = self._with_prefix(q, k, v, cast(jax.Array, mask), shared)
        elif isinstance(k, Compressed) or isinstance(v, Compressed):
            y = attend_to_parts(q, [Keys(k, v, cast(jax.Array, mask), bias_HTS)], cfg)
        elif self.choose is None:
            y = attend(q, k, v, cast(jax.Array, mask), bias_HTS, cfg)
        else:
            y = self.choose(q, k, v, mask, shared, local, cfg, cross=self.cross)
        y = constrain(y, "batch", "seq", "act_heads", None).reshape(*x_BTD.shape[:2], H * K)
        out = Dense(cfg.d_model, ("heads", "embed"), cfg.out_bias, self.dtype, residual_scale(self.layers), name="o")
        return out(y)

    def _with_prefix(
        self, q: jax.Array, k: kv_cache.Cached, v: kv_cache.Cached, mask_BTS: jax.Array, shared: Shared
    ) -> jax.Array:
        """Compute attention to the trained keys of prefix tuning and to the text.

        All tokens attend to all trained keys.
        """
        cfg = self.config
        own_k, own_v = Prefix(cfg, self.dtype, name="prefix")(len(q))
        before_BTP = jnp.ones((*mask_BTS.shape[:2], cfg.prefix_tokens), bool)
        if shared.slot is not None:  # a joined array would be a copy of the cache, at every step
            text = Keys(k, v, mask_BTS, shared.bias_HTS)
            return attend_to_parts(q, [Keys(own_k, own_v, before_BTP, shared.bias_HTP), text], cfg)
        k = jnp.concatenate([own_k, cast(jax.Array, k)], axis=1)
        v = jnp.concatenate([own_v, cast(jax.Array, v)], axis=1)
        biases = [bias for bias in (shared.bias_HTP, shared.bias_HTS) if bias is not None]
        bias = jnp.concatenate(biases, axis=2) if biases else None
        return attend(q, k, v, jnp.concatenate([before_BTP, mask_BTS], axis=2), bias, cfg)

    def _heads(self, name: str, x: jax.Array, heads: int, axis: str, scale: float = 1.0) -> jax.Array:
        cfg = self.config
        y = Dense(heads * cfg.head_dim, ("embed", axis), cfg.qkv_bias, self.dtype, scale, name=name)(x)
        y = checkpoint_name(y, PROJECTED).reshape(*x.shape[:2], heads, cfg.head_dim)
        return constrain(y, "batch", "seq", "act_heads", None)


def _pick(local: jax.Array, when_local: Any, otherwise: Any) -> Any:
    if when_local is None:
        return otherwise
    return jax.tree.map(partial(jnp.where, local), when_local, otherwise)
