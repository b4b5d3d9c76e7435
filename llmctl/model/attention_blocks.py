"""Compute attention on CPUs in blocks of scores that fit into the cache of a processor core.

In plain XLA, all scores [B, H, T, S] pass through memory several times per layer. Here, a block has some heads and
queries of one sequence. The scores of a block stay in the cache. If attention is causal, a block has no keys after the
block's last query. This saves up to half of the products.

A block is computed by the same arithmetic as in `attention_xla`. The backward pass computes the scores of each block
again.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, N = R * T, K head width, g key/value
heads per block, M = G / g blocks of heads per sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmctl.model import attention_xla
from llmctl.model.attention_xla import KEPT
from llmctl.model.config import ModelConfig

BLOCK = 1 << 16
"""Target number of scores per block: 256 KiB in float32, which fits into the second-level cache of common
processors."""
MOST_QUERY_BLOCKS = 8
"""Maximum number of blocks of queries. Each block of queries is compiled separately."""
LEAST_QUERIES = 64
"""Minimum number of queries per block. Products with fewer rows are slow."""


class Plan(NamedTuple):
    """Store the static choices for one call of `attend`."""

    softcap: float
    causal: bool
    heads: int
    """Number of key/value heads per block."""
    queries: int
    """Number of queries per block."""

    def query_blocks(self, T: int, S: int) -> Iterator[tuple[slice, slice]]:
        """Yield the slice of queries of each block, and the slice of keys that these queries may attend to."""
        for first in range(0, T, self.queries):
            end = min(first + self.queries, T)
            yield slice(first, end), slice(0, end if self.causal else S)


def pays(batch: int, heads: int, queries: int, keys: int) -> bool:
    """Return whether blocks are faster than one product for all scores.

    Blocks are faster if there are at least LEAST_QUERIES queries, and if the scores fill more than 4 blocks.
    """
    return queries >= LEAST_QUERIES and batch * heads * queries * keys > 4 * BLOCK


def make_plan(shape_BGNK: tuple[int, ...], T: int, S: int, softcap: float, causal: bool) -> Plan:
    """Choose the block sizes for queries of the shape [B, G, N, K], T queries per head and S keys."""
    G, N = shape_BGNK[1:3]
    R = N // T
    queries = max(LEAST_QUERIES, -(-T // MOST_QUERY_BLOCKS), BLOCK // (R * S))
    if causal:
        queries = min(queries, max(2 * LEAST_QUERIES, -(-T // MOST_QUERY_BLOCKS)))
    queries = min(queries, T)
    fitting = [g for g in range(1, G + 1) if G % g == 0 and g * R * queries * S <= BLOCK]
    return Plan(softcap, causal, max(fitting, default=1), queries)


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array,
    bias_HTS: jax.Array | None,
    cfg: ModelConfig,
    *,
    causal: bool,
) -> jax.Array:
    """Compute attention block by block; the arguments are those of `attention_xla.attend`.

    Args:
        q_BTHK: Queries.
        k_BSGK: Keys.
        v_BSGK: Values.
        mask_BTS: Whether a query may attend to a key.
        bias_HTS: Additive bias of the scores, or None.
        cfg: Config of the model.
        causal: Whether the mask forbids all keys after the query, so that these keys can be skipped.

    Returns:
        Outputs [B, T, H, K]. For queries without visible keys, the outputs differ from those of `attention_xla.attend`.
    """
    T, S = mask_BTS.shape[1:]

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        plan = make_plan(q.shape, T, S, cfg.attn_softcap, causal)
        return cast(jax.Array, _attend(plan, q, k, v, mask_BTS, bias_HTS))

    return attention_xla.by_head(run, q_BTHK, k_BSGK, v_BSGK, cfg)


class _Blocks:
    """Split the arrays of a call by sequence and heads, for `jax.lax.scan`, and join the results."""

    def __init__(self, plan: Plan, q_BGNK: jax.Array, mask_BTS: jax.Array, bias_HTS: jax.Array | None) -> None:
        self.plan, self.mask_BTS = plan, mask_BTS
        self.B, self.G, self.N, self.K = q_BGNK.shape
        self.T, self.S = mask_BTS.shape[1:]
        self.R, self.M = self.N // self.T, self.G // plan.heads
        self.bias = None if bias_HTS is None else bias_HTS.reshape(self.M, -1, self.T, self.S)
        self.indices = jnp.arange(self.B * self.M)

    def split(self, a: jax.Array) -> jax.Array:
        """Reshape an array [B, G, ...] to [B * M, 1, g, ...], with one entry per sequence and block of heads."""
        return a.reshape(self.B * self.M, 1, self.plan.heads, *a.shape[2:])

    def join(self, a: jax.Array) -> jax.Array:
        """Reshape an array [B * M, 1, g, ...] to [B, G, ...]; inverse of `split`."""
        return a.reshape(self.B, self.G, *a.shape[3:])

    def by_query(self, a: jax.Array) -> jax.Array:
        """Reshape an array [1, g, N, K] to [1, g, R, T, K], with N = R * T. The queries of a head then have an axis of
        their own, of length T."""
        return a.reshape(1, self.plan.heads, self.R, self.T, -1)

    def visible(self, index: jax.Array, queries: slice, keys: slice) -> tuple[jax.Array, jax.Array | None]:
        """Return the mask and the position bias of one block.

        `index` is the position of the block's sequence and heads on axis 0 of the result of `split`.
        """
        mask = self.mask_BTS[index // self.M][None, queries, keys]
        return mask, None if self.bias is None else self.bias[index % self.M][:, queries, keys]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> jax.Array:
    return _forward(plan, q, k, v, mask_BTS, bias_HTS)[0]


def _forward(plan: Plan, q: Any, k: Any, v: Any, mask_BTS: Any, bias_HTS: Any) -> Any:
    blocks = _Blocks(plan, q, mask_BTS, bias_HTS)

    def step(_: None, operands: Any) -> Any:
        index, q, k, v = operands
        found = []
        for queries, keys in plan.query_blocks(blocks.T, blocks.S):
            q_block = blocks.by_query(q)[:, :, :, queries].reshape(1, plan.heads, -1, blocks.K)
            seen = attention_xla.sums(
                plan.softcap, q_block, k[:, :, keys], v[:, :, keys], *blocks.visible(index, queries, keys)
            )
            values = seen.values.reshape(*seen.total.shape[:-1], -1)
            found.append(((values / seen.total).astype(v.dtype), seen.top, seen.total))
        return None, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *found)

    _, found = jax.lax.scan(step, None, (blocks.indices, *map(blocks.split, (q, k, v))))
    y, top, total = map(blocks.join, found)
    y = y.reshape(q.shape)
    q, k, v, y, top, total = (checkpoint_name(a, KEPT) for a in (q, k, v, y, top, total))
    return y, (q, k, v, mask_BTS, bias_HTS, y, top, total)


def _backward(plan: Plan, saved: Any, d_y: jax.Array) -> Any:
    q, k, v, mask_BTS, bias_HTS, y, top, total = saved
    blocks = _Blocks(plan, q, mask_BTS, bias_HTS)
    dot = attention_xla.output_gradient_dot(d_y, y).reshape(top.shape)

    def step(d_bias: Any, operands: Any) -> Any:
        index, q, k, v, d_y, *seen = operands
        d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for queries, keys in plan.query_blocks(blocks.T, blocks.S):
            q_block, d_y_block = (
                blocks.by_query(a)[:, :, :, queries].reshape(1, plan.heads, -1, blocks.K) for a in (q, d_y)
            )
            *new, d_scores = attention_xla.block_gradients(
                plan.softcap, q_block, k[:, :, keys], v[:, :, keys], *blocks.visible(index, queries, keys),
                [a[:, :, :, queries] for a in seen], d_y_block, wide=True,
            )  # fmt: skip
            d_q.append(new[0].reshape(1, plan.heads, blocks.R, -1, blocks.K).astype(q.dtype))
            d_k, d_v = d_k.at[:, :, keys].add(new[1]), d_v.at[:, :, keys].add(new[2])
            if d_bias is not None:
                heads = d_scores.reshape(-1, *d_scores.shape[3:])
                d_bias = d_bias.at[index % blocks.M, :, queries, keys].add(heads)
        return d_bias, (jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype))

    operands = (blocks.indices, *map(blocks.split, (q, k, v, d_y, top, total, dot)))
    start = None if blocks.bias is None else jnp.zeros(blocks.bias.shape, jnp.float32)
    d_bias, found = jax.lax.scan(step, start, operands)
    d_q, d_k, d_v = map(blocks.join, found)
    if d_bias is not None:
        d_bias = d_bias.reshape(bias_HTS.shape).astype(bias_HTS.dtype)
    return d_q.reshape(q.shape), d_k, d_v, None, d_bias


_attend.defvjp(_forward, _backward)
