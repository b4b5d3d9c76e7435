"""Attention: grouped-query self-attention and cross-attention, with masks, rotary tables and position bias.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, K head width, D model width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmctl.distributed import mesh as meshes
from llmctl.distributed.mesh import constrain
from llmctl.model import attention_kernels, hf_config, ring_attention
from llmctl.model.attention_xla import attend
from llmctl.model.config import ModelConfig
from llmctl.model.layers import Dense, Norm, residual_scale, rotary_table, rotate

PROJECTED = "projected"
"""Checkpoint name of projected queries, keys and values, for rematerialization policies."""


class Shared(NamedTuple):
    """Inputs that all layers of a stack share.

    The `local_*` fields serve layers with a sliding window. Absent parts are None.
    """

    mask_BTS: jax.Array | None
    """None under ring attention (`llmctl.model.ring_attention`), which derives masks from segments."""
    local_mask_BTS: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    local_rotary: tuple[jax.Array, jax.Array] | None = None
    bias_HTS: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    memory_mask_BTS: jax.Array | None = None
    memory_segments_BS: jax.Array | None = None
    bias_table_UH: jax.Array | None = None
    """Table of the position bias. Ring attention uses it and the segments instead of bias and masks."""
    slot: jax.Array | int | None = None
    """Cache slot of the first token; None without a cache."""
    causal_BT: jax.Array | None = None
    """Segments of tokens under causal attention. Without a cache, this field or the next is set."""
    mutual_BT: jax.Array | None = None
    """Segments of tokens under bidirectional attention."""
    rows_B: jax.Array | None = None
    """Index of each row in the full batch, of which these rows may be a part."""


def visible(segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Return the mask [B, T, S] of pairs in the same document, without padding (segment 0)."""
    return (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)


def distances(mask_BTS: jax.Array, slot: jax.Array | int | None, order_BT: jax.Array | None) -> jax.Array:
    """Return the distance [T, S] from each query to each key, in positions.

    Args:
        mask_BTS: Mask, for its shape.
        slot: Cache slot of the first query; None without a cache.
        order_BT: Positions of the tokens if they differ from their array order.
    """
    T, S = mask_BTS.shape[1:]
    if order_BT is not None:  # all rows have the same order
        return order_BT[0][None, :] - order_BT[0][:, None]
    return jnp.arange(S)[None, :] - jnp.arange(T)[:, None] - (0 if slot is None else slot)


def share(
    cfg: ModelConfig,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    causal: bool,
    cached_BS: jax.Array | None = None,
    slot: jax.Array | int | None = None,
    order_BT: jax.Array | None = None,
) -> Shared:
    """Build the masks and rotary tables of a self-attention stack.

    Args:
        cfg: Config of the model.
        segments_BT: Document of each token; 0 is padding.
        positions_BT: Position of each token in its document.
        causal: Whether tokens attend to earlier tokens only.
        cached_BS: Segments of all S cache slots. The T tokens occupy the slots from `slot` to `slot + T`.
        slot: Cache slot of the first token; None without a cache.
        order_BT: Order of the tokens, if rows are in balanced order (`llmctl.distributed.context_parallel`).
    """
    mask = local = None
    if order_BT is None or not meshes.splits_sequences():
        keys_BS = segments_BT if cached_BS is None else cached_BS
        mask = visible(segments_BT, keys_BS)
        distance_TS = distances(mask, slot, order_BT)
        if causal:
            mask &= distance_TS <= 0
        if cfg.window:
            local = mask & (jnp.abs(distance_TS) < cfg.window)
    rotary = local_rotary = None
    if cfg.positions == "rope":
        rotary = rotary_table(positions_BT, cfg, cfg.rope_theta)
        if cfg.rope_local_theta:
            unscaled = cfg.model_copy(update={"rope_scaling": {}})
            local_rotary = rotary_table(positions_BT, unscaled, cfg.rope_local_theta)
    shared = Shared(mask, local, rotary, local_rotary, slot=slot, rows_B=jnp.arange(len(segments_BT)))
    if slot is not None:
        return shared
    return shared._replace(causal_BT=segments_BT) if causal else shared._replace(mutual_BT=segments_BT)


def local_layers(cfg: ModelConfig, layers: int) -> jax.Array:
    """Return which layers have local attention, bool [L]."""
    return jnp.asarray(hf_config.local_layers(cfg, layers) if cfg.window else [False] * layers)


def cache_shape(B: int, G: int, S: int, K: int) -> tuple[int, ...]:
    """Return the shape of a layer's cached keys or values: [B, G, S, K] without those of B and G that are 1.

    This is the layout that the products of `attend` read, so that XLA can update the cache in place. If
    the program dropped an axis of size 1 between the update and the product, XLA's CPU backend would fuse the two
    separately. It would then copy the cache at every step.
    """
    return (*(n for n in (B, G) if n > 1), S, K)


class Attention(nn.Module):
    """Self-attention, or cross-attention to `shared.memory_BSD` if `cross` is set."""

    config: ModelConfig
    dtype: Any
    layers: int
    cross: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, shared: Shared, local: jax.Array) -> jax.Array:
        cfg = self.config
        K, H, G = cfg.head_dim, cfg.heads, cfg.kv_heads
        source_BSD = cast(jax.Array, shared.memory_BSD) if self.cross else x_BTD
        # The scale gives initial scores of about unit variance for any score factor. T5's factor of 1 would saturate
        # the softmax.
        q = self._heads("q", x_BTD, H, "heads", K**-0.5 / (cfg.attn_scale or K**-0.5))
        q = Norm(cfg, self.dtype, name="q_norm")(q) if cfg.qk_norm else q
        if self.cross and self.has_variable("cache", "memory_k"):
            k, v = self._recall("memory_k", len(x_BTD)), self._recall("memory_v", len(x_BTD))
        else:
            k = self._heads("k", source_BSD, G, "kv_heads")
            v = self._heads("v", source_BSD, G, "kv_heads")
            k = Norm(cfg, self.dtype, name="k_norm")(k) if cfg.qk_norm else k
            if self.cross and shared.slot is not None:  # the memory is constant, so later tokens reuse it
                self.put_variable("cache", "memory_k", _laid_out(k))
                self.put_variable("cache", "memory_v", _laid_out(v))
        if not self.cross and shared.rotary is not None:
            table = _pick(local, shared.local_rotary, shared.rotary)
            q, k = rotate(q, table), rotate(k, table)
        if not self.cross and shared.slot is not None:
            k, v = self._remember("k", k, shared.slot), self._remember("v", v, shared.slot)
        mask = shared.memory_mask_BTS if self.cross else _pick(local, shared.local_mask_BTS, shared.mask_BTS)
        y = self._attend(q, k, v, mask, shared, local)
        y = constrain(y, "batch", "seq", "act_heads", None).reshape(*x_BTD.shape[:2], H * K)
        out = Dense(cfg.d_model, ("heads", "embed"), cfg.out_bias, self.dtype, residual_scale(self.layers), name="o")
        return out(y)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: jax.Array | None, shared: Shared, local: jax.Array
    ) -> jax.Array:
        """Compute attention by ring attention, by the platform's kernel if it applies, or else in plain XLA.

        Returns:
            Outputs [B, T, H, K].
        """
        cfg, causal = self.config, shared.causal_BT is not None
        segments_BT = shared.mutual_BT if shared.causal_BT is None else shared.causal_BT
        if mask_BTS is None:
            return self._in_a_ring(q, k, v, cast(jax.Array, segments_BT), shared, local)
        if not self.cross and segments_BT is not None and shared.bias_HTS is None:
            kernel = attention_kernels.choose(cfg, q.shape[1], q.dtype).kernel
            if kernel == "splash":
                return attention_kernels.splash(q, k, v, segments_BT, local, cfg, causal=causal)
            if kernel == "cudnn":
                return attention_kernels.cudnn(q, k, v, mask_BTS, cfg)
        return attend(q, k, v, mask_BTS, None if self.cross else shared.bias_HTS, cfg)

    def _in_a_ring(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array, shared: Shared, local: jax.Array
    ) -> jax.Array:
        if self.cross:
            return ring_attention.attend(
                q, k, v, segments_BT, cast(jax.Array, shared.memory_segments_BS), self.config, causal=False
            )
        causal = shared.causal_BT is not None
        return ring_attention.attend(
            q, k, v, segments_BT, segments_BT, self.config, causal=causal, local=local,
            table_UH=shared.bias_table_UH, bucket=partial(bucket_of, self.config, not causal),
        )  # fmt: skip

    def _remember(self, name: str, new_BTGK: jax.Array, slot: jax.Array | int) -> jax.Array:
        """Write keys or values into the cache (see `cache_shape`), and return all cached ones [B, S, G, K]."""
        B, T, G, K = new_BTGK.shape
        kept = self.variable("cache", f"past_{name}", lambda: jnp.zeros(cache_shape(B, G, T, K), self.dtype))
        new = _laid_out(new_BTGK).astype(kept.value.dtype)
        kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, new, slot, axis=kept.value.ndim - 2)
        return self._recall(f"past_{name}", B)

    def _recall(self, name: str, B: int) -> jax.Array:
        """Return the cached array `name` as [B, S, G, K]."""
        kept = self.get_variable("cache", name)
        return kept.reshape(B, self.config.kv_heads, -1, self.config.head_dim).transpose(0, 2, 1, 3)

    def _heads(self, name: str, x: jax.Array, heads: int, axis: str, scale: float = 1.0) -> jax.Array:
        cfg = self.config
        y = Dense(heads * cfg.head_dim, ("embed", axis), cfg.qkv_bias, self.dtype, scale, name=name)(x)
        y = checkpoint_name(y, PROJECTED).reshape(*x.shape[:2], heads, cfg.head_dim)
        return constrain(y, "batch", "seq", "act_heads", None)


def _laid_out(x_BTGK: jax.Array) -> jax.Array:
    """Transpose keys or values to the layout of the cache (`cache_shape`)."""
    B, T, G, K = x_BTGK.shape
    return x_BTGK.transpose(0, 2, 1, 3).reshape(cache_shape(B, G, T, K))


def _pick(local: jax.Array, when_local: Any, otherwise: Any) -> Any:
    if when_local is None:
        return otherwise
    return jax.tree.map(partial(jnp.where, local), when_local, otherwise)


class RelativeBias(nn.Module):
    """Table [U, H] of T5's learned relative position bias, shared by all layers of a stack.

    (Raffel et al., 2019, arXiv:1910.10683)
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        cfg = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("norm", "heads"))
        return self.param("table", init, (cfg.relative_buckets, cfg.heads), unbox=True)


def bucket_of(cfg: ModelConfig, bidirectional: bool, distance: jax.Array) -> jax.Array:
    """Return the bucket of each key-minus-query distance under this config."""
    return relative_bucket(distance, cfg.relative_buckets, cfg.relative_max_distance, bidirectional)


def relative_bucket(distance: jax.Array, buckets: int, max_distance: int, bidirectional: bool) -> jax.Array:
    """Return the bucket of each key-minus-query distance: exact for short distances, logarithmic for long ones."""
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
