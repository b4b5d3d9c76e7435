"""Compute attention in plain XLA, without fused kernels.

The backward pass recomputes the scores from queries and keys. This costs less memory traffic than saving the
probabilities of every layer (FlashAttention; Dao et al., 2022, arXiv:2205.14135). Only q, k, v, the output and two
numbers per query and head are saved.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, N = R * T, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmctl.model.compressed_cache import Compressed
from llmctl.model.config import ModelConfig

KEPT = "attention"
"""Name of the arrays that the backward pass of the softmax needs, for rematerialization policies. If a policy saves
these arrays, the forward pass of the softmax is not repeated."""
MASKED = -1e30
"""Attention score of a masked query-key pair. The score is finite, so that a query without visible keys has finite
outputs."""


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array,
    bias_HTS: jax.Array | None,
    cfg: ModelConfig,
) -> jax.Array:
    """Compute attention with scores and softmax in float32.

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

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return cast(jax.Array, _attend(cfg.attn_softcap, q, k, v, mask_BTS, bias_HTS))

    return by_head(run, q_BTHK, k_BSGK, v_BSGK, cfg)


def by_head(
    run: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    cfg: ModelConfig,
) -> jax.Array:
    """Scale the queries, call `run` on arrays whose first axes are (B, G), and restore the axes of its outputs.

    The query heads that share a key head are folded into one matrix. All products are then batched matrix products over
    (B, G).

    Args:
        run: Function of queries [B, G, N, K], keys [B, G, S, K] and values [B, G, S, K]. The result is [B, G, N, K].
        q_BTHK: Queries.
        k_BSGK: Keys.
        v_BSGK: Values.
        cfg: Config of the model.

    Returns:
        Outputs [B, T, H, K].
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGNK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    q_BGNK = q_BGNK * jnp.asarray(cfg.attn_scale or K**-0.5, q_BTHK.dtype)
    y_BGNK = run(q_BGNK, k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3))
    return y_BGNK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def probabilities(
    q_BTHK: jax.Array, k_BSGK: jax.Array, mask_BTS: jax.Array, bias_HTS: jax.Array | None, cfg: ModelConfig
) -> jax.Array:
    """Compute the attention probabilities, float32 [B, H, T, S], for analyses of a model.

    The arguments are those of `attend`, which never stores these probabilities.
    """
    found: list[jax.Array] = []

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores, _ = _scores(cfg.attn_softcap, q, k, mask_BTS, bias_HTS)
        found.append(jax.nn.softmax(scores, axis=-1))
        return q

    by_head(run, q_BTHK, k_BSGK, k_BSGK, cfg)
    p_BGRTS = found[0]
    return p_BGRTS.reshape(len(p_BGRTS), -1, *p_BGRTS.shape[3:])


class Keys(NamedTuple):
    """Store a block of keys with their values, mask and bias.

    Plain keys and values have the axes [B, S, G, K]. Quantized keys and values have the axes [B, G, S, K].
    """

    k_BSGK: jax.Array | Compressed
    v_BSGK: jax.Array | Compressed
    mask_BTS: jax.Array
    bias_HTS: jax.Array | None


def attend_to_parts(q_BTHK: jax.Array, parts: Sequence[Keys], cfg: ModelConfig) -> jax.Array:
    """Compute attention to several blocks of keys, without concatenating them.

    The softmax sums of the blocks are merged. The backward pass would store all scores, so this function is used only
    for decoding.

    Returns:
        Outputs [B, T, H, K], equal to those of `attend` for the concatenated blocks.
    """
    B, T, H, K = q_BTHK.shape
    G = parts[0].k_BSGK.shape[1 if isinstance(parts[0].k_BSGK, Compressed) else 2]
    q_BGNK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    q_BGNK = q_BGNK * jnp.asarray(cfg.attn_scale or K**-0.5, q_BTHK.dtype)
    found = [
        sums(cfg.attn_softcap, q_BGNK, _by_head(part.k_BSGK), _by_head(part.v_BSGK), part.mask_BTS, part.bias_HTS)
        for part in parts
    ]
    whole = functools.reduce(merge, found)
    y_BGNK = (whole.values / whole.total.reshape(B, G, -1, 1)).astype(q_BTHK.dtype)
    return y_BGNK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _by_head(a_BSGK: jax.Array | Compressed) -> jax.Array | Compressed:
    return a_BSGK if isinstance(a_BSGK, Compressed) else a_BSGK.transpose(0, 2, 1, 3)


def _product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: Any) -> jax.Array:
    """Compute a matrix product that is batched over the first two axes (B, G).

    Axis `contract_a` of `a` and axis `contract_b` of `b` are contracted.
    """
    dims = (((contract_a,), (contract_b,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _transpose_product(p: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """Return transpose(p) @ rows, an array [B, G, S, K].

    The arguments are `p` [B, G, N, S] and `rows` [B, G, N, K].

    The result is computed as transpose(transpose(rows) @ p), which is 1.4 to 2 times as fast on XLA's CPU backend. The
    optimization barrier prevents XLA from changing this form.
    """
    return jax.lax.optimization_barrier(_product(rows, p, 2, 2, dtype)).swapaxes(2, 3)


def _scores(softcap: float, q: jax.Array, k: Any, mask_BTS: jax.Array, bias_HTS: jax.Array | None) -> Any:
    """Return (masked scores [B, G, R, T, S] in float32, derivative of the soft cap).

    If there is no soft cap, the derivative is None.
    """
    B, G, N, _ = q.shape
    T, S = mask_BTS.shape[1:]
    found = k.key_product(q) if isinstance(k, Compressed) else _product(q, k, 3, 3, jnp.float32)
    scores = found.reshape(B, G, N // T, T, S)
    slope = None
    if softcap:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - jnp.square(bent)
    if bias_HTS is not None:
        scores = scores + bias_HTS.reshape(-1, G, N // T, T, S)
    return jnp.where(mask_BTS[:, None, None], scores, MASKED), slope


class Sums(NamedTuple):
    """Store partial sums of the softmax over a block of keys. The sums of several blocks can be merged (Milakov and
    Gimelshein, 2018, arXiv:1805.02867).
    """

    values: jax.Array
    """Sum of exp(score - top) * value over the keys, float32 [B, G, N, K]."""
    top: jax.Array
    """Maximum score over the keys, [B, G, R, T, 1]."""
    total: jax.Array
    """Sum of exp(score - top) over the keys, [B, G, R, T, 1]."""


def sums(softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> Sums:
    """Compute the softmax sums over a block of keys; the arguments are those of `block_gradients`."""
    scores, _ = _scores(softcap, q, k, mask_BTS, bias_HTS)
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if isinstance(v, Compressed):
        return Sums(v.value_product(p.reshape(*q.shape[:3], -1), q.dtype), top, total)
    return Sums(_product(p.astype(v.dtype).reshape(*q.shape[:3], -1), v, 3, 2, jnp.float32), top, total)


def merge(old: Sums, new: Sums) -> Sums:
    """Merge the softmax sums of two blocks of keys."""
    top = jnp.maximum(old.top, new.top)
    values, total = jnp.zeros(()), jnp.zeros(())
    for part in (old, new):
        scale = jnp.exp(part.top - top)
        values += part.values * scale.reshape(*part.values.shape[:-1], 1)
        total += part.total * scale
    return Sums(values, top, total)


def block_gradients(
    softcap: float, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any, seen: Any, d_y: Any, wide: bool = False
) -> Any:
    """Compute the gradients of attention with respect to queries, keys, values and scores, for a block of keys.

    Args:
        softcap: Soft cap of the scores; 0 means none.
        q: Scaled queries [B, G, N, K].
        k: Keys [B, G, S, K].
        v: Values [B, G, S, K].
        mask_BTS: Whether a query may attend to a key.
        bias_HTS: Additive bias of the scores, or None.
        seen: (`Sums.top` over all keys, `Sums.total` over all keys, result of `output_gradient_dot`).
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


def output_gradient_dot(d_y: jax.Array, y: jax.Array) -> jax.Array:
    """Return the dot product of each output y [..., N, K] with its gradient d_y, float32 [..., N].

    The backward pass of the softmax subtracts this number from the gradients of the query's probabilities.
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
    seen = (top, total, output_gradient_dot(d_y, y).reshape(top.shape))
    d_q, d_k, d_v, d_scores = block_gradients(softcap, q, k, v, mask_BTS, bias_HTS, seen, d_y)
    d_bias = None if bias_HTS is None else jnp.sum(d_scores, axis=0).reshape(bias_HTS.shape).astype(bias_HTS.dtype)
    return d_q, d_k, d_v, None, d_bias


_attend.defvjp(_forward, _backward)
