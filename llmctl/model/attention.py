"""Compute attention: grouped-query self-attention and cross-attention, with the softmax in plain XLA.

The backward pass of the softmax recomputes the scores from queries and keys. This costs less memory traffic than saving
the probabilities of every layer (FlashAttention; Dao et al., 2022, arXiv:2205.14135). Only q, k, v, the output and two
numbers per row are saved.

Features that only some runs need are in `attention_kernels`, `ring_attention`, `relative_bias` and `kv_cache`.

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
from llmctl.model import hf_config, kv_cache
from llmctl.model.config import ModelConfig
from llmctl.model.layers import Dense, Norm, residual_scale, rotary_table, rotate

PROJECTED = "projected"
"""Checkpoint name of projected queries, keys and values, for rematerialization policies."""
KEPT = "attention"
"""Checkpoint name of the arrays that the softmax saves for its backward pass. With a policy that saves them, the
backward pass does not repeat the forward pass of the softmax."""
MASKED = -1e30
"""Score of a masked pair. It is finite, so that a row without any visible key (padding) stays finite."""

Choose = Callable[..., jax.Array]
"""Type of functions that select and run an attention kernel: (q, k, v, mask, shared, local, config, cross) -> outputs
of attention [B, T, H, K]."""


class Shared(NamedTuple):
    """Store the inputs that all layers of a stack share.

    The `local_*` fields are for layers with a sliding window. Fields that are not used are None.
    """

    mask_BTS: jax.Array | None
    """Whether a query may attend to a key. None for ring attention, which derives its masks from the segments."""
    local_mask_BTS: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    local_rotary: tuple[jax.Array, jax.Array] | None = None
    bias_HTS: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    memory_mask_BTS: jax.Array | None = None
    memory_segments_BS: jax.Array | None = None
    bias_table_UH: jax.Array | None = None
    """Table of the relative position bias, only for ring attention, which computes the bias block by block."""
    slot: jax.Array | int | None = None
    """Cache slot of the first token; None without a cache."""
    causal_BT: jax.Array | None = None
    """Segment of each token if attention is causal. With a cache, this field and `mutual_BT` are None."""
    mutual_BT: jax.Array | None = None
    """Segment of each token if attention is bidirectional."""
    rows_B: jax.Array | None = None
    """Index of each row in the full batch, of which these rows may be a part. Dropout masks depend on this index."""


def visible(segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Return the mask [B, T, S] of (query, key) pairs in the same segment. No query attends to padding (segment 0)."""
    return (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)


def distances(mask_BTS: jax.Array, slot: jax.Array | int | None, order_BT: jax.Array | None) -> jax.Array:
    """Return the position of each key minus the position of each query, int [T, S].

    Args:
        mask_BTS: Mask, which is used only for its shape.
        slot: Cache slot of the first query; None without a cache.
        order_BT: Positions of the tokens, if they differ from the array order.
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
    """Build the inputs that all layers of a self-attention stack share: masks and rotary tables.

    Args:
        cfg: Config of the model.
        segments_BT: Segment of each token; 0 is padding.
        positions_BT: Position of each token in its segment.
        causal: Whether tokens attend to earlier tokens only.
        cached_BS: Segment of each cache slot; None without a cache. The T tokens use the slots from `slot` to `slot +
            T`.
        slot: Cache slot of the first token; None without a cache.
        order_BT: Text position of each token, if rows are permuted for context parallelism.
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


class Attention(nn.Module):
    """Compute self-attention, or cross-attention to `shared.memory_BSD` if `cross` is set."""

    config: ModelConfig
    dtype: Any
    layers: int
    cross: bool = False
    choose: Choose | None = None
    """Function that selects an attention kernel (`attention_kernels.attend`); None uses plain XLA."""

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
            k, v = (kv_cache.recall(self, f"memory_{name}", len(x_BTD), G, K) for name in "kv")
        else:
            k = self._heads("k", source_BSD, G, "kv_heads")
            v = self._heads("v", source_BSD, G, "kv_heads")
            k = Norm(cfg, self.dtype, name="k_norm")(k) if cfg.qk_norm else k
            if self.cross and shared.slot is not None:  # the memory is constant, so later tokens reuse it
                kv_cache.keep_memory(self, "k", k)
                kv_cache.keep_memory(self, "v", v)
        if not self.cross and shared.rotary is not None:
            table = _pick(local, shared.local_rotary, shared.rotary)
            q, k = rotate(q, table), rotate(k, table)
        if not self.cross and shared.slot is not None:
            k, v = (kv_cache.remember(self, name, x, shared.slot, self.dtype) for name, x in (("k", k), ("v", v)))
        mask = shared.memory_mask_BTS if self.cross else _pick(local, shared.local_mask_BTS, shared.mask_BTS)
        if self.choose is None:
            y = attend(q, k, v, cast(jax.Array, mask), None if self.cross else shared.bias_HTS, cfg)
        else:
            y = self.choose(q, k, v, mask, shared, local, cfg, cross=self.cross)
        y = constrain(y, "batch", "seq", "act_heads", None).reshape(*x_BTD.shape[:2], H * K)
        out = Dense(cfg.d_model, ("heads", "embed"), cfg.out_bias, self.dtype, residual_scale(self.layers), name="o")
        return out(y)

    def _heads(self, name: str, x: jax.Array, heads: int, axis: str, scale: float = 1.0) -> jax.Array:
        cfg = self.config
        y = Dense(heads * cfg.head_dim, ("embed", axis), cfg.qkv_bias, self.dtype, scale, name=name)(x)
        y = checkpoint_name(y, PROJECTED).reshape(*x.shape[:2], heads, cfg.head_dim)
        return constrain(y, "batch", "seq", "act_heads", None)


def _pick(local: jax.Array, when_local: Any, otherwise: Any) -> Any:
    if when_local is None:
        return otherwise
    return jax.tree.map(partial(jnp.where, local), when_local, otherwise)


# --- softmax in plain XLA ---------------------------------------------------------------------------------------------


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array,
    bias_HTS: jax.Array | None,
    cfg: ModelConfig,
) -> jax.Array:
    """Compute attention with scores and softmax in float32.

    The query heads that share a key head are folded into one matrix. All products are then batched matrix products over
    (B, G).

    Args:
        q_BTHK: Queries.
        k_BSGK: Keys.
        v_BSGK: Values.
        mask_BTS: Whether a query may attend to a key.
        bias_HTS: Additive bias of the scores, or None.
        cfg: Config of the model.

    Returns:
        Outputs [B, T, H, K].
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGNK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    q_BGNK = q_BGNK * jnp.asarray(cfg.attn_scale or K**-0.5, q_BTHK.dtype)
    y_BGNK = cast(jax.Array, _attend(cfg.attn_softcap, q_BGNK, k_BGSK, v_BGSK, mask_BTS, bias_HTS))
    return y_BGNK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: Any) -> jax.Array:
    """Compute a matrix product that is batched over the first two axes (B, G).

    Axis `contract_a` of `a` and axis `contract_b` of `b` are contracted.
    """
    dims = (((contract_a,), (contract_b,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _transpose_product(p: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """Return the transpose of p [B, G, N, S], multiplied by rows [B, G, N, K]: an array [B, G, S, K].

    The product is computed as transpose(transpose(rows) p), which is 1.4 to 2 times as fast on XLA's CPU backend. The
    optimization barrier stops XLA from rewriting this product.
    """
    return jax.lax.optimization_barrier(_product(rows, p, 2, 2, dtype)).swapaxes(2, 3)


def _scores(softcap: float, q: jax.Array, k: jax.Array, mask_BTS: jax.Array, bias_HTS: jax.Array | None) -> Any:
    """Compute masked scores [B, G, R, T, S] in float32, and the derivative of the soft cap (None without a cap)."""
    B, G, N, _ = q.shape
    T, S = mask_BTS.shape[1:]
    scores = _product(q, k, 3, 3, jnp.float32).reshape(B, G, N // T, T, S)
    slope = None
    if softcap:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - jnp.square(bent)
    if bias_HTS is not None:
        scores = scores + bias_HTS.reshape(1, G, N // T, T, S)
    return jnp.where(mask_BTS[:, None, None], scores, MASKED), slope


class Sums(NamedTuple):
    """Store the softmax sums of queries over a block of keys; the sums of several blocks can be merged.

    (Milakov and Gimelshein, 2018, arXiv:1805.02867)
    """

    values: jax.Array
    """Sum of exp(score - top) * value over the keys, float32 [B, G, N, K]."""
    top: jax.Array
    """Maximum score over the keys, [B, G, R, T, 1]."""
    total: jax.Array
    """Sum of exp(score - top) over the keys, [B, G, R, T, 1]."""


def sums(softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> Sums:
    """Compute the softmax sums over a block of keys, for scaled queries [B, G, N, K]."""
    scores, _ = _scores(softcap, q, k, mask_BTS, bias_HTS)
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return Sums(_product(p.astype(v.dtype).reshape(*q.shape[:3], -1), v, 3, 2, jnp.float32), top, total)


def pull(
    softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any, seen: Any, d_y: Any, wide: bool = False
) -> Any:
    """Compute the gradients of attention for a block of keys.

    Args:
        softcap: Soft cap of the scores; 0 means none.
        q: Scaled queries [B, G, N, K].
        k: Keys [B, G, S, K].
        v: Values [B, G, S, K].
        mask_BTS: Whether a query may attend to a key.
        bias_HTS: Additive bias of the scores, or None.
        seen: (top, total, share) over all keys; share is the sum over K of d_y * y.
        d_y: Gradient of the outputs [B, G, N, K].
        wide: Whether the gradients of q, k and v are float32. Otherwise they have the dtypes of q, k and v.

    Returns:
        Gradients of queries, keys, values and scores [B, G, R, T, S].
    """
    top, total, share = seen
    kinds = [jnp.float32 if wide else a.dtype for a in (q, k, v)]
    scores, slope = _scores(softcap, q, k, mask_BTS, bias_HTS)
    p = jnp.exp(scores - top) / total
    flat = (*q.shape[:3], scores.shape[-1])
    d_v = _transpose_product(p.astype(v.dtype).reshape(flat), d_y, kinds[2])
    d_p = _product(d_y, v, 3, 3, jnp.float32).reshape(p.shape)
    d_scores = jnp.where(mask_BTS[:, None, None], p * (d_p - share), 0)
    d_raw = d_scores if slope is None else d_scores * slope
    d_raw = d_raw.astype(q.dtype).reshape(flat)
    return _product(d_raw, k, 3, 2, kinds[0]), _transpose_product(d_raw, q, kinds[1]), d_v, d_scores


def share_of(d_y: jax.Array, y: jax.Array) -> jax.Array:
    """Return the sum over K of d_y * y, float32 [..., N].

    The softmax gradient subtracts it from every score's gradient.
    """
    return jnp.sum(d_y.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> jax.Array:
    return _forward(softcap, q, k, v, mask_BTS, bias_HTS)[0]


def _forward(softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> Any:
    values, top, total = sums(softcap, q, k, v, mask_BTS, bias_HTS)
    y = (values / total.reshape(*q.shape[:3], 1)).astype(v.dtype)
    q, k, v, y, top, total = (checkpoint_name(a, KEPT) for a in (q, k, v, y, top, total))
    return y, (q, k, v, mask_BTS, bias_HTS, y, top, total)


def _backward(softcap: float, saved: Any, d_y: jax.Array) -> Any:
    q, k, v, mask_BTS, bias_HTS, y, top, total = saved
    seen = (top, total, share_of(d_y, y).reshape(top.shape))
    d_q, d_k, d_v, d_scores = pull(softcap, q, k, v, mask_BTS, bias_HTS, seen, d_y)
    d_bias = None if bias_HTS is None else jnp.sum(d_scores, axis=0).reshape(bias_HTS.shape).astype(bias_HTS.dtype)
    return d_q, d_k, d_v, None, d_bias


_attend.defvjp(_forward, _backward)
