"""One walk over the calibration data, block by block: what every compression method learns about a layer's inputs.

All batches are embedded; then, layer by layer, the inputs of each matrix are folded into statistics, a callback may
change the layer, and the batches go on through the changed layer, so that later layers see the errors of earlier ones.
In memory at a time: one layer's statistics, and the residual stream of every batch. Changed layers are put where the
unchanged ones were. All layers of a stack run one compiled block.

Shapes: B batch, T sequence, D model width, N tokens of a batch, I inputs of a matrix, H blocks of K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.config import ModelConfig

Batch = dict[str, Any]
Layer = dict[str, Any]


class Statistic(Protocol):
    """A sum over tokens of something about a matrix's inputs; a pytree of float32 arrays."""

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Self:
        """The statistic with the tokens added where `real_N` is True."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["squares", "absolute", "count"], meta_fields=[])
@dataclass(frozen=True)
class Moments:
    """Sum of squares [I], sum of absolute values [I] and number of tokens of a matrix's inputs."""

    squares: jax.Array
    absolute: jax.Array
    count: jax.Array

    @staticmethod
    def start(inputs: int) -> Moments:
        """No tokens yet."""
        zeros = jnp.zeros(inputs, jnp.float32)
        return Moments(zeros, zeros, jnp.zeros((), jnp.float32))

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Moments:
        """See Statistic."""
        x_NI = jnp.where(real_N[:, None], x_NI.astype(jnp.float32), 0.0)
        return Moments(
            self.squares + jnp.sum(jnp.square(x_NI), axis=0),
            self.absolute + jnp.sum(jnp.abs(x_NI), axis=0),
            self.count + jnp.sum(real_N),
        )


@partial(jax.tree_util.register_dataclass, data_fields=["products"], meta_fields=[])
@dataclass(frozen=True)
class Gram:
    """X^T X of the inputs in H blocks of K, [H, K, K]: one block of all is a Hessian, one a head serves heads."""

    products: jax.Array

    @staticmethod
    def start(inputs: int, blocks: int = 1) -> Gram:
        """No tokens yet."""
        width = inputs // blocks
        return Gram(jnp.zeros((blocks, width, width), jnp.float32))

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Gram:
        """See Statistic."""
        x_NI = jnp.where(real_N[:, None], x_NI.astype(jnp.float32), 0.0)
        x_NHK = x_NI.reshape(x_NI.shape[0], self.products.shape[0], -1)
        return Gram(self.products + jnp.einsum("nhk,nhl->hkl", x_NHK, x_NHK))


Stats = dict[str, Any]
"""Statistics of one layer by the path of the matrix ("attn/q", "mlp/down")."""

Collect = Callable[[str, int], Statistic | None]
"""(path of a matrix, its number of inputs) -> an empty statistic, or None where nothing is wanted."""

Change = Callable[[str, int, Layer, Stats], Layer]
"""(stack, index, the layer's parameters, its statistics) -> the changed parameters, same shapes."""


@dataclass(frozen=True)
class LayerReport:
    """What the walk saw of one layer; means over real tokens."""

    stack: str
    layer: int
    influence: float
    """1 - cosine between what enters and what leaves the unchanged layer (block influence, arXiv:2403.03853)."""
    error: float
    """||changed output - unchanged output|| / ||unchanged output - input|| on the same inputs: 1 is a layer undone."""
    stats: Stats
    """The layer's statistics, where the walk was asked to keep them."""


def moments(path: str, inputs: int) -> Statistic:
    """Collects Moments for every matrix."""
    return Moments.start(inputs)


def nothing(path: str, inputs: int) -> None:
    """Collects nothing: the walk measures influence alone."""


def walk(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    collect: Collect,
    change: Change | None = None,
    *,
    keep: bool = False,
    progress: Callable[[LayerReport], None] | None = None,
    dtype: Any = jnp.float32,
) -> tuple[dict[str, Any], list[LayerReport]]:
    """Walks every stack in the order it runs; returns the (changed) parameters and a report a layer.

    Batches are as the model takes them (tokens, segments, positions [B, T]; encoder_* as well where there is an encoder
    beside the decoder); padding (segment 0) counts for nothing. Without `change` it is a measurement and `params` are
    returned as they came; with it the arrays of their blocks are given away. `keep` leaves each layer's statistics in
    its report. Raises RequestError without real tokens.
    """
    if not any(bool((batch["segments"] > 0).any()) for batch in batches):
        raise RequestError("calibration has no tokens: the data yields no example")
    reports: list[LayerReport] = []
    memories: list[Any] = [None] * len(batches)
    for stack in functional.stacks(cfg):
        beside = stack == "encoder" and cfg.encoder_layers > 0
        start = jax.jit(partial(functional.embed_encoder if beside else functional.embed, cfg, dtype=dtype))
        extra = [() if beside else (memory,) for memory in memories]
        carries = [start(params, batch, *more) for batch, more in zip(batches, extra, strict=True)]
        params, carries, seen = _walk_stack(
            cfg, params, stack, batches, carries, collect, change, keep, progress, dtype
        )
        reports += seen
        if beside:
            end = jax.jit(partial(functional.finish, cfg, dtype=dtype), static_argnames=("stack",))
            memories = [end(params=params, stack=stack, carry=carry) for carry in carries]
    return params, reports


def _walk_stack(
    cfg: ModelConfig,
    params: dict[str, Any],
    stack: str,
    batches: Sequence[Batch],
    carries: list[functional.Carry],
    collect: Collect,
    change: Change | None,
    keep: bool,
    progress: Callable[[LayerReport], None] | None,
    dtype: Any,
) -> tuple[dict[str, Any], list[functional.Carry], list[LayerReport]]:
    look, advance = passes(cfg, stack, dtype)
    blocks = params[stack]["blocks"]
    put = putter(blocks)
    reports: list[LayerReport] = []
    fresh: Stats | None = None
    for i in range(functional.depth(cfg, stack)):
        layer, index = jax.tree.map(lambda a, i=i: a[i], blocks), jnp.int32(i)
        if fresh is None:
            fresh = empty(cfg, stack, layer, carries[0], collect, dtype)
        stats = fresh
        influence, error = jnp.zeros(2), 0.0
        for n, batch in enumerate(batches):
            out, stats, more = look(layer, index, carries[n], batch, stats)
            influence += more
            if change is None:
                carries[n] = out
        if change is not None:
            new, strayed = change(stack, i, layer, stats), jnp.zeros(2)
            for n, batch in enumerate(batches):
                carries[n], more = advance(layer, new, index, carries[n], batch)
                strayed += more
            error = float(jnp.sqrt(strayed[0] / jnp.maximum(strayed[1], 1e-30)))
            blocks = put(blocks, new, index)
        report = LayerReport(stack, i, float(influence[0] / influence[1]), error, stats if keep else {})
        reports.append(report)
        if progress is not None:
            progress(report)
    return {**params, stack: {**params[stack], "blocks": blocks}} if change else params, carries, reports


def putter(blocks: Layer) -> Any:
    """Compiled (blocks [L, ...], one layer, its index) -> the blocks with that layer, in the memory of the old ones."""

    def put(blocks: Layer, layer: Layer, index: jax.Array) -> Layer:
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, index, 0), blocks, layer)

    return jax.jit(put, donate_argnums=0, out_shardings=jax.tree.map(lambda a: a.sharding, blocks))


def passes(cfg: ModelConfig, stack: str, dtype: Any) -> tuple[Any, Any]:
    """The two compiled functions of a walk over one stack: look at a layer, and advance through the changed one."""
    beside = stack == "encoder" and cfg.encoder_layers > 0

    def real(batch: Batch, path: str) -> jax.Array:
        """[N] which rows of a matrix's input are tokens; cross-attention's keys and values read the encoder's."""
        memory = beside or path in ("cross/k", "cross/v")
        return jnp.asarray(batch["encoder_segments" if memory else "segments"]).reshape(-1) > 0

    @jax.jit
    def look(
        layer: Layer, index: jax.Array, carry: functional.Carry, batch: Batch, stats: Stats
    ) -> tuple[Any, Stats, Any]:
        """One batch through the layer: what leaves it, the statistics with it folded in, and its influence."""
        out, taps = functional.block(cfg, stack, layer, carry, index, taps=True, dtype=dtype)
        stats = {path: stat.fold(taps[path], real(batch, path)) for path, stat in stats.items()}
        return out, stats, _influence(carry.x_BTD, out.x_BTD, real(batch, ""))

    @jax.jit
    def advance(old: Layer, new: Layer, index: jax.Array, carry: functional.Carry, batch: Batch) -> tuple[Any, Any]:
        """One batch through the changed layer, and how far it strays from the unchanged one on the same input."""
        before, _ = functional.block(cfg, stack, old, carry, index, dtype=dtype)
        after, _ = functional.block(cfg, stack, new, carry, index, dtype=dtype)
        mask = real(batch, "")
        strayed = _square_norm(after.x_BTD - before.x_BTD, mask), _square_norm(before.x_BTD - carry.x_BTD, mask)
        return after, jnp.stack(strayed)

    return look, advance


def empty(cfg: ModelConfig, stack: str, layer: Layer, carry: functional.Carry, collect: Collect, dtype: Any) -> Stats:
    """The statistics of one layer before any token."""
    run = partial(functional.block, cfg, stack, taps=True, dtype=dtype)
    _, taps = jax.eval_shape(lambda layer, carry: run(layer, carry, 0), layer, carry)
    found = {path: collect(path, tap.shape[-1]) for path, tap in sorted(taps.items())}
    return {path: stat for path, stat in found.items() if stat is not None}


def _influence(x_BTD: jax.Array, y_BTD: jax.Array, real_N: jax.Array) -> jax.Array:
    """[sum over real tokens of 1 - cosine(x, y), number of them]."""
    x_ND, y_ND = (v.astype(jnp.float32).reshape(-1, v.shape[-1]) for v in (x_BTD, y_BTD))
    norms = jnp.linalg.norm(x_ND, axis=-1) * jnp.linalg.norm(y_ND, axis=-1)
    cosine = jnp.sum(x_ND * y_ND, axis=-1) / jnp.maximum(norms, 1e-30)
    return jnp.stack([jnp.sum(jnp.where(real_N, 1.0 - cosine, 0.0)), jnp.sum(real_N).astype(jnp.float32)])


def _square_norm(x_BTD: jax.Array, real_N: jax.Array) -> jax.Array:
    x_ND = x_BTD.astype(jnp.float32).reshape(-1, x_BTD.shape[-1])
    return jnp.sum(jnp.where(real_N[:, None], jnp.square(x_ND), 0.0))
