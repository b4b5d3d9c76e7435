"""Softmax attention in plain XLA. What the backward pass needs of the scores it computes again from queries and keys.

Saving the probabilities of every layer costs more memory traffic than recomputing them (FlashAttention's observation,
arXiv:2205.14135); kept are q, k, v, the output and two numbers a row.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, N = R * T, K head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmctl.model import ModelConfig

KEPT = "attention"
"""Name of what the backward pass reads, for rematerialization policies: kept, no product of the scores is repeated."""
MASKED = -1e30
"""Score of a pair that may not attend; finite, so that a row with nothing to see (padding) stays finite."""


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array,
    bias_HTS: jax.Array | None,
    cfg: ModelConfig,
) -> jax.Array:
    """Attention with scores and softmax in float32 -> [B, T, H, K].

    The query heads of one key head are folded into its rows, so all products are batched matrix products over (B, G).
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGNK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    q_BGNK = q_BGNK * jnp.asarray(cfg.attn_scale or K**-0.5, q_BTHK.dtype)
    y_BGNK = cast(jax.Array, _attend(cfg.attn_softcap, q_BGNK, k_BGSK, v_BGSK, mask_BTS, bias_HTS))
    return y_BGNK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: Any) -> jax.Array:
    """Batched matrix product over (B, G), contracting one axis of each."""
    dims = (((contract_a,), (contract_b,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _gather(p: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """p [B, G, N, S] transposed times rows [B, G, N, K] -> [B, G, S, K].

    Taken as (rows transposed times p), transposed, which XLA's CPU backend runs faster (1.4 to 2x); the barrier
    keeps it from turning the one into the other.
    """
    return jax.lax.optimization_barrier(_product(rows, p, 2, 2, dtype)).swapaxes(2, 3)


def _scores(softcap: float, q: jax.Array, k: jax.Array, mask_BTS: jax.Array, bias_HTS: jax.Array | None) -> Any:
    """Masked scores [B, G, R, T, S] in float32, and the slope of the soft cap."""
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> jax.Array:
    return _forward(softcap, q, k, v, mask_BTS, bias_HTS)[0]


def _forward(softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> Any:
    scores, _ = _scores(softcap, q, k, mask_BTS, bias_HTS)
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    B, G, N, _ = q.shape
    y = _product(p.astype(v.dtype).reshape(B, G, N, -1), v, 3, 2, jnp.float32) / total.reshape(B, G, N, 1)
    q, k, v, y, top, total = (checkpoint_name(a, KEPT) for a in (q, k, v, y.astype(v.dtype), top, total))
    return y, (q, k, v, mask_BTS, bias_HTS, y, top, total)


def _backward(softcap: float, saved: Any, d_y: jax.Array) -> Any:
    q, k, v, mask_BTS, bias_HTS, y, top, total = saved
    scores, slope = _scores(softcap, q, k, mask_BTS, bias_HTS)
    p = jnp.exp(scores - top) / total
    flat = (*q.shape[:3], scores.shape[-1])
    d_v = _gather(p.astype(v.dtype).reshape(flat), d_y, v.dtype)
    d_p = _product(d_y, v, 3, 3, jnp.float32).reshape(p.shape)
    share = jnp.sum(d_y.astype(jnp.float32) * y.astype(jnp.float32), axis=-1).reshape(*p.shape[:-1], 1)
    d_scores = jnp.where(mask_BTS[:, None, None], p * (d_p - share), 0)
    d_bias = None if bias_HTS is None else jnp.sum(d_scores, axis=0).reshape(bias_HTS.shape).astype(bias_HTS.dtype)
    d_raw = d_scores if slope is None else d_scores * slope
    d_raw = d_raw.astype(q.dtype).reshape(flat)
    return _product(d_raw, k, 3, 2, q.dtype), _gather(d_raw, q, k.dtype), d_v, None, d_bias


_attend.defvjp(_forward, _backward)
