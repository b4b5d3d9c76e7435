"""Compute attention over sequences that are sharded over devices. Keys and values are sent around a ring of devices
(Liu et al., 2023, arXiv:2310.01889).

Each device has one early and one late chunk of the sequence (the zig-zag order of
`llmctl.distributed.context_parallel`). Causal attention then takes the same work on every device at every step. Fully
masked blocks are not computed. After each step, softmax sums are merged in float32. The backward pass sends keys and
values around the ring again. Only q, k, v, the output and one number per query and head are saved for the backward
pass.

Shapes: B batch, T queries and S keys in total, t and s per device, P chunks per device, c = t / P. P is 2 for causal
attention, otherwise 1. H query heads, G key/value heads, R = H / G, N = R * c, K head width, U buckets of the position
bias.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from llmctl.distributed import context_parallel
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_xla
from llmctl.model.config import ModelConfig

AXIS = "context"


class Plan(NamedTuple):
    """Store the settings of ring attention that are constants of the program."""

    mesh: Mesh
    causal: bool
    softcap: float
    window: int
    bucket: Callable[[jax.Array], jax.Array] | None
    """Function from distances (key minus query position) to buckets of the position bias; None without a bias."""


class Block(NamedTuple):
    """Store the keys that a device holds at one step, with their values and segments.

    The s keys are split into P chunks. Keys and values have the shape [P, B, G, s / P, K]. Segments have the shape
    [P, B, s / P].
    """

    k: jax.Array
    v: jax.Array
    segments: jax.Array


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    cfg: ModelConfig,
    *,
    causal: bool,
    local: jax.Array | bool = False,
    table_UH: jax.Array | None = None,
    bucket: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Compute attention over sharded sequences whose tokens are in the zig-zag order of the module docstring.

    If several texts are packed into a sequence, a token attends only to tokens of the same text.

    Args:
        q_BTHK: Queries.
        k_BSGK: Keys of the tokens in `q_BTHK`, or of the encoder's output.
        v_BSGK: Values of the tokens of `k_BSGK`.
        segments_BT: Number of the packed text that each query belongs to; 0 is padding.
        segments_BS: Number of the packed text that each key belongs to; 0 is padding.
        cfg: Config with the score scale, soft cap and window.
        causal: Whether tokens attend to earlier tokens only.
        local: Whether this layer has the sliding window.
        table_UH: Table of T5's position bias, or None.
        bucket: Function from distances (key minus query position) to rows of `table_UH`; None without a bias.

    Returns:
        Outputs [B, T, H, K].
    """
    mesh = meshes.current()
    assert mesh is not None
    q_BTHK = q_BTHK * jnp.asarray(cfg.attn_scale or cfg.head_dim**-0.5, q_BTHK.dtype)
    plan = Plan(mesh, causal, cfg.attn_softcap, cfg.window, None if table_UH is None else bucket)
    return _attend(plan, q_BTHK, k_BSGK, v_BSGK, (segments_BT, segments_BS, jnp.asarray(local)), table_UH)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Any, k: Any, v: Any, about: Any, table_UH: Any) -> jax.Array:
    return _forward(plan, q, k, v, about, table_UH)[0]


def _specs(plan: Plan) -> Any:
    """Return the PartitionSpecs of q, k, v, the tuple (query segments, key segments, `local`), and the bias table."""
    heads, rows = (meshes.spec(n, plan.mesh) for n in (("batch", "seq", "act_heads", None), ("batch", "seq")))
    return heads, heads, heads, (rows, rows, PartitionSpec()), meshes.spec((None, "act_heads"), plan.mesh)


def _forward(plan: Plan, q: Any, k: Any, v: Any, about: Any, table_UH: Any) -> Any:
    specs = _specs(plan)
    numbers = PartitionSpec(*specs[0][:3])
    run = meshes.per_device(partial(_forward_here, plan), plan.mesh, specs, (specs[0], numbers))
    kept = (q, k, v, *run(q, k, v, about, table_UH))
    q, k, v, y, top_BTH = (checkpoint_name(a, attention_xla.KEPT) for a in kept)
    return y, (q, k, v, about, table_UH, y, top_BTH)


def _backward(plan: Plan, saved: Any, d_y: jax.Array) -> Any:
    specs = _specs(plan)
    numbers = PartitionSpec(*specs[0][:3])
    replica_axes = meshes.axes_of(specs[3][0])
    here = partial(_backward_here, plan, replica_axes)
    run = meshes.per_device(here, plan.mesh, (*specs, specs[0], numbers, specs[0]), (*specs[:3], specs[4]))
    d_q, d_k, d_v, d_table = run(*saved, d_y)
    return d_q, d_k, d_v, None, d_table


_attend.defvjp(_forward, _backward)


# --- on one device ---------------------------------------------------------------------------------------------------


def _forward_here(plan: Plan, q: Any, k: Any, v: Any, about: Any, table_UH: Any) -> Any:
    """Run the forward pass of ring attention on one device.

    Returns:
        Outputs [B, t, H, K], and the logarithms of the softmax denominators [B, t, H].
    """
    here, block = _LocalQueries(plan, q, k, about, table_UH), _block(plan, k, v, about[1])
    N = here.q.shape[-2]
    numbers = jnp.zeros((*here.q.shape[:3], N // here.length, here.length, 1), jnp.float32)
    seen = attention_xla.Sums(jnp.zeros(here.q.shape, jnp.float32), numbers + attention_xla.MASKED, numbers)

    def visit(seen: attention_xla.Sums, block: Block, step: Any) -> attention_xla.Sums:
        for a, b in here.pairs(step):
            new = attention_xla.sums(plan.softcap, *here.operands(a, b, block), *here.visible(a, b, block, step))
            seen = jax.tree.map(partial(_put, a), seen, attention_xla.merge(jax.tree.map(partial(_at, a), seen), new))
        return seen

    def ring_step(carry: Any, step: jax.Array) -> tuple[Any, None]:
        seen, block = carry
        received = here.send_to_next(block)  # independent of the products, so that XLA can overlap them
        return (visit(seen, block, step), received), None

    received = here.send_to_next(block)
    seen, _ = jax.lax.scan(ring_step, (visit(seen, block, 0), received), jnp.arange(1, here.devices))[0]
    y = seen.values / seen.total.reshape(*here.q.shape[:-1], 1)
    denominator = seen.top + jnp.log(seen.total)
    return _unfold(y.astype(v.dtype), q.shape), _unfold(denominator.reshape(*y.shape[:-1], 1), q.shape)[..., 0]


def _backward_here(
    plan: Plan, replica_axes: list[str], q: Any, k: Any, v: Any, about: Any, table_UH: Any, y: Any, top: Any, d_y: Any
) -> Any:
    """Run the backward pass of ring attention on one device; return the gradients of q, k, v and the bias table.

    The gradient of the table is summed over `replica_axes`, the mesh axes along which the table is replicated.
    """
    here, block = _LocalQueries(plan, q, k, about, table_UH), _block(plan, k, v, about[1])
    P, N = here.q.shape[0], here.q.shape[-2]
    d_y_PBGNK = _fold(d_y, P, here.q.shape[2])
    rows = (*here.q.shape[:3], N // here.length, here.length, 1)
    dots = attention_xla.output_gradient_dot(d_y, y)
    top, share = (_fold(a[..., None], P, here.q.shape[2]).reshape(rows) for a in (top, dots))

    def visit(d_q: jax.Array, d_table: Any, d_kv: Any, block: Block, step: Any) -> Any:
        for a, b in here.pairs(step):
            seen = (_at(a, top), 1.0, _at(a, share))
            visible = here.visible(a, b, block, step)
            *new, d_scores = attention_xla.block_gradients(
                plan.softcap, *here.operands(a, b, block), *visible, seen, _at(a, d_y_PBGNK), wide=True
            )
            d_q = _put(a, d_q, _at(a, d_q) + new[0])
            d_kv = tuple(_put(b, d, _at(b, d) + n) for d, n in zip(d_kv, new[1:], strict=True))
            if table_UH is not None:
                d_HTS = jnp.sum(d_scores, axis=0).reshape(-1, *d_scores.shape[-2:])
                d_table = d_table.at[here.buckets(a, b, step)].add(jnp.moveaxis(d_HTS, 0, -1))
        return d_q, d_table, d_kv

    def ring_step(carry: Any, step: jax.Array) -> tuple[Any, None]:
        d_q, d_table, d_kv, block = carry
        received = here.send_to_next(block)
        d_q, d_table, d_kv = visit(d_q, d_table, d_kv, block, step)
        return (d_q, d_table, here.send_to_next(d_kv), received), None

    zero = jnp.zeros(here.q.shape, jnp.float32)
    d_kv = (jnp.zeros(block.k.shape, jnp.float32),) * 2
    d_table = None if table_UH is None else jnp.zeros(table_UH.shape, jnp.float32)
    received = here.send_to_next(block)
    d_q, d_table, d_kv = visit(zero, d_table, d_kv, block, 0)
    start = (d_q, d_table, here.send_to_next(d_kv), received)
    # After a full round, gradients are on the device of their keys.
    d_q, d_table, d_kv, _ = jax.lax.scan(ring_step, start, jnp.arange(1, here.devices))[0]
    if table_UH is not None:
        d_table = jax.lax.psum(d_table, replica_axes).astype(table_UH.dtype)
    d_k, d_v = (_unfold(d, k.shape).astype(k.dtype) for d in d_kv)
    return _unfold(d_q, q.shape).astype(q.dtype), d_k, d_v, d_table


class _LocalQueries:
    """Store the queries of one device, and compute masks and position biases for the keys that the device receives."""

    def __init__(self, plan: Plan, q: jax.Array, k: jax.Array, about: Any, table_UH: jax.Array | None) -> None:
        self.plan, self.table_UH, self.local = plan, table_UH, about[2]
        self.devices, self.device = plan.mesh.shape[AXIS], jax.lax.axis_index(AXIS)
        self.chunks = 2 if plan.causal else 1
        self.q = _fold(q, self.chunks, k.shape[2])
        self.length = q.shape[1] // self.chunks
        self.keys = k.shape[1] // self.chunks
        self.segments_PBc = _chunks(about[0], self.chunks)

    def pairs(self, step: Any) -> list[tuple[Any, Any]]:
        return context_parallel.pairs(self.plan.causal, step, self.device, jnp.where)

    def operands(self, a: Any, b: Any, block: Block) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _at(a, self.q), _at(b, block.k), _at(b, block.v)

    def visible(self, a: Any, b: Any, block: Block, step: Any) -> tuple[jax.Array, jax.Array | None]:
        """Return (mask [B, c, s / P], position bias [H, c, s / P]) for query chunk `a` and key chunk `b`.

        Without a bias table, the bias is None. The causal mask is applied only in the first step, because
        `context_parallel.pairs` omits masked pairs of chunks in later steps.
        """
        mine, theirs = _at(a, self.segments_PBc)[:, :, None], _at(b, block.segments)[:, None, :]
        mask = (mine == theirs) & (theirs > 0)
        if self.plan.window or (self.plan.causal and isinstance(step, int)):
            back = -self.distance(a, b, step)
            if self.plan.causal and isinstance(step, int):
                mask &= back >= 0
            if self.plan.window:
                mask &= ~self.local | (jnp.abs(back) < self.plan.window)
        if self.table_UH is None:
            return mask, None
        return mask, jnp.moveaxis(self.table_UH.astype(jnp.float32)[self.buckets(a, b, step)], -1, 0)

    def buckets(self, a: Any, b: Any, step: Any) -> jax.Array:
        assert self.plan.bucket is not None
        return self.plan.bucket(self.distance(a, b, step))

    def distance(self, a: Any, b: Any, step: Any) -> jax.Array:
        """Return key position minus query position for query chunk `a` and key chunk `b`, int [c, s / P]."""
        mine = self._positions(self.device, a, self.length)
        theirs = self._positions((self.device - step) % self.devices, b, self.keys)
        return theirs[None, :] - mine[:, None]

    def _positions(self, device: Any, chunk: Any, length: int) -> jax.Array:
        """Return the sequence positions of the tokens in chunk `chunk` of a device, int [length].

        Each device has tokens from an early and a late part of the sequence. If attention is causal, these parts are
        two chunks, otherwise one chunk.
        """
        late = 2 * self.devices - 1 - device
        if self.chunks == 2:
            return jnp.where(chunk == 0, device, late) * length + jnp.arange(length)
        half = jnp.arange(length // 2)
        return jnp.concatenate([device * (length // 2) + half, late * (length // 2) + half])

    def send_to_next(self, tree: Any) -> Any:
        """Send arrays to the next device of the ring, and return the arrays that the previous device sent."""
        ring = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, ring), tree)


def _block(plan: Plan, k: jax.Array, v: jax.Array, segments_Bs: jax.Array) -> Block:
    P, G = 2 if plan.causal else 1, k.shape[2]
    return Block(_fold(k, P, G), _fold(v, P, G), _chunks(segments_Bs, P))


def _at(chunk: Any, a: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, chunk, 0, keepdims=False)


def _put(chunk: Any, a: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(a, new, chunk, 0)


def _chunks(segments_Bt: jax.Array, P: int) -> jax.Array:
    """Split segments into chunks, [B, t] -> [P, B, c]."""
    return segments_Bt.reshape(len(segments_Bt), P, -1).swapaxes(0, 1)


def _fold(x_BtHK: jax.Array, P: int, G: int) -> jax.Array:
    """Reshape [B, t, H, K] to [P, B, G, N, K].

    Tokens are split into P chunks of c tokens. Axis N merges the c tokens of a chunk and the R query heads of a key
    head.
    """
    B, t, H, K = x_BtHK.shape
    x = x_BtHK.reshape(B, P, t // P, G, H // G, K).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(P, B, G, -1, K)


def _unfold(x_PBGNK: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Restore the shape [B, t, H, ...]; inverse of `_fold`."""
    P, _, G, _, K = x_PBGNK.shape
    B, t, H = shape[:3]
    return x_PBGNK.reshape(P, B, G, H // G, t // P, K).transpose(1, 0, 4, 2, 3, 5).reshape(B, t, H, K)
