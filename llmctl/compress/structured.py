"""Structured pruning: whole attention heads, feed-forward neurons and layers go, and the arrays really shrink.

Every layer keeps the same widths (layers are scanned) but chooses for itself which heads and neurons. Importance is
the size of what a part adds to the residual stream on the calibration data. Parts that go are first silenced (zero rows
where they are read) while the walk goes on, so that later layers choose with the inputs they will really see, and are
cut at the end.

Shapes: L layers, H query heads, G key/value heads, R = H / G, K head width, F neurons, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.compress import prune
from llmctl.compress.calibrate import Batch, Collect, Gram, LayerReport, Moments, Statistic, Stats, nothing, walk
from llmctl.compress.shrink import Kept, cut, drop_layers
from llmctl.model import functional, hf_config
from llmctl.model.config import ModelConfig
from llmctl.model.weights import dense

Progress = Callable[[LayerReport], None] | None


def head_scores(gram: Gram, o: jax.Array) -> jax.Array:
    """||X_h O_h||_F of each query head: what it adds to the residual stream. `o` [H*K, D] -> [H]."""
    heads, width, _ = gram.products.shape
    o_HKD = o.astype(jnp.float32).reshape(heads, width, -1)
    square_H = jnp.einsum("hkl,hkd,hld->h", gram.products, o_HKD, o_HKD)
    return jnp.sqrt(jnp.maximum(square_H, 0.0))


def neuron_scores(stats: Moments, down: jax.Array) -> jax.Array:
    """||x_f||_2 * ||down_f||_2 of each neuron: what it adds to the residual stream. `down` [F, D] -> [F]."""
    return jnp.sqrt(stats.squares) * jnp.linalg.norm(down.astype(jnp.float32), axis=1)


def choose_heads(score_H: np.ndarray, groups: int, keep_groups: int, keep_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """The (query heads, key/value heads) that stay, ascending, so that every group that stays keeps the same number.

    First the queries that stay in each group, then the groups, by the norm of the scores of those queries.
    """
    each = keep_heads // keep_groups
    score_GR = score_H.reshape(groups, -1)
    best_GR = np.sort(_highest(score_GR, each), axis=1)
    group_G = np.sqrt(np.sum(np.square(np.take_along_axis(score_GR, best_GR, axis=1)), axis=1))
    kept = np.sort(_highest(group_G[None], keep_groups)[0])
    heads = (kept[:, None] * score_GR.shape[1] + best_GR[kept]).reshape(-1)
    return heads, kept


def choose_neurons(score_F: np.ndarray, keep: int) -> np.ndarray:
    """The `keep` neurons of the highest score, ascending."""
    return np.sort(_highest(score_F[None], keep)[0])


def choose_layers(influence_L: Sequence[float], keep: int, kinds_L: Sequence[bool]) -> list[int]:
    """The `keep` layers of the highest total influence, ascending, such that the i-th is of kind `kinds_L[i]`.

    Kinds are local and global attention: their pattern belongs to the config, so a layer may only move to a place of
    its own kind. Where all are of one kind these are simply the best. Solved exactly, by dynamic programming.
    """
    layers = len(influence_L)
    total = np.full((layers + 1, keep + 1), -np.inf)
    total[:, 0] = 0.0
    for i in range(layers):
        for n in range(1, keep + 1):
            taken = total[i, n - 1] + influence_L[i] if kinds_L[i] == kinds_L[n - 1] else -np.inf
            total[i + 1, n] = max(total[i, n], taken)
    chosen: list[int] = []
    for i in reversed(range(layers)):
        n = keep - len(chosen)
        if n and total[i + 1, n] > total[i, n]:
            chosen.append(i)
    return chosen[::-1]


def _highest(score: np.ndarray, keep: int) -> np.ndarray:
    """Positions of the `keep` highest along the last axis; of equal scores the first stays."""
    return np.argsort(-score, axis=-1, kind="stable")[..., :keep]


def prune_layers(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    target: ModelConfig,
    progress: Progress = None,
    dtype: Any = jnp.float32,
) -> tuple[ModelConfig, dict[str, Any], dict[str, list[int]]]:
    """Drops the layers of least block influence (ShortGPT, arXiv:2403.03853) until each stack has `target`'s depth.

    The walk computes in `dtype`. Returns the config, the parameters and the layers that stayed, a stack.
    """
    _, reports = walk(cfg, params, batches, nothing, progress=progress, dtype=dtype)
    kept: dict[str, list[int]] = {}
    for stack in functional.stacks(cfg):
        influence = [r.influence for r in reports if r.stack == stack]
        kinds = hf_config.local_layers(cfg, len(influence))
        kept[stack] = choose_layers(influence, functional.depth(target, stack), kinds)
    return (*drop_layers(cfg, params, kept), kept)


def fewer_layers(cfg: ModelConfig, target: ModelConfig) -> bool:
    """Return whether `target` has fewer layers in a stack."""
    return (target.layers, target.encoder_layers) != (cfg.layers, cfg.encoder_layers)


def narrower(cfg: ModelConfig, target: ModelConfig) -> bool:
    """Return whether `target` has fewer heads or neurons per layer."""
    return (target.heads, target.kv_heads, target.d_ff) != (cfg.heads, cfg.kv_heads, cfg.d_ff)


def collector(cfg: ModelConfig, target: ModelConfig) -> Collect:
    """What has to be known of a layer's inputs to cut it to `target`: of the heads' outputs, of the neurons'."""

    def collect(path: str, inputs: int) -> Statistic | None:
        if path.endswith("/o") and (target.heads, target.kv_heads) != (cfg.heads, cfg.kv_heads):
            return Gram.start(inputs, cfg.heads)
        return Moments.start(inputs) if path == "mlp/down" and target.d_ff != cfg.d_ff else None

    return collect


def prune_widths(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    target: ModelConfig,
    progress: Progress = None,
    dtype: Any = jnp.float32,
) -> tuple[ModelConfig, dict[str, Any], list[LayerReport]]:
    """Cuts every layer to `target`'s heads, kv_heads and d_ff, each layer choosing its own; `walk` takes the blocks.

    With relative positions the layers of a stack share one bias a head, so there self-attention keeps the same heads in
    all of them, by scores normalized a layer and summed. Returns the config, the parameters and a report a layer.
    """
    collect = collector(cfg, target)
    heads_change = (target.heads, target.kv_heads) != (cfg.heads, cfg.kv_heads)
    shared_bias = heads_change and cfg.positions == "relative"
    common = _common_heads(cfg, params, batches, collect, dtype) if shared_bias else {}
    kept: Kept = {stack: {} for stack in functional.stacks(cfg)}

    def change(stack: str, index: int, layer: dict[str, Any], stats: Stats) -> dict[str, Any]:
        out = {name: dict(part) for name, part in layer.items()}
        for path, stat in stats.items():
            part, name = path.split("/")
            kernel = out[part][name]["kernel"]
            if isinstance(stat, Gram):
                scores = common[stack] if part == "attn" and common else np.asarray(head_scores(stat, dense(kernel)))
                heads, groups = choose_heads(scores, cfg.kv_heads, target.kv_heads, target.heads)
                kept[stack].setdefault(f"{part}/heads", []).append(heads)
                kept[stack].setdefault(f"{part}/groups", []).append(groups)
                rows = (heads[:, None] * cfg.head_dim + np.arange(cfg.head_dim)).reshape(-1)
            else:
                rows = choose_neurons(np.asarray(neuron_scores(stat, dense(kernel))), target.d_ff)
                kept[stack].setdefault(f"{part}/neurons", []).append(rows)
            mask = np.zeros((kernel.shape[0], 1), bool)
            mask[rows] = True
            out[part][name] = {**out[part][name], "kernel": prune.apply(kernel, jnp.asarray(mask))}
        return out

    params, reports = walk(cfg, params, batches, collect, change, progress=progress, dtype=dtype)
    return (*cut(cfg, params, target, kept), reports)


def _common_heads(
    cfg: ModelConfig, params: dict[str, Any], batches: Sequence[Batch], collect: Collect, dtype: Any
) -> dict[str, np.ndarray]:
    """Scores [H] of the self-attention heads of a stack over all its layers, each layer's normalized to sum 1."""
    _, reports = walk(cfg, params, batches, collect, keep=True, dtype=dtype)
    scores = {stack: np.zeros(cfg.heads, np.float32) for stack in functional.stacks(cfg)}
    for r in reports:
        o = functional.layer_params(params, r.stack, r.layer)["attn"]["o"]["kernel"]
        score = np.asarray(head_scores(r.stats["attn/o"], dense(o)))
        scores[r.stack] += score / max(float(score.sum()), 1e-30)
    return scores
