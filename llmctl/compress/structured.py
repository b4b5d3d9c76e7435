"""Prune attention heads, feed-forward neurons and layers, so that arrays become smaller (structured pruning).

All layers of an encoder or decoder keep the same number of heads and neurons, because they are scanned. Each layer
selects its own heads and neurons. The importance of a head or neuron is the norm of its contribution to the residual
stream on the calibration data. The layers are processed in order. A removed head or neuron is first disabled by zero
rows in the matrix that reads its output. Later layers therefore select by the inputs that they will have after pruning.
The arrays are reduced at the end.

Shapes: L layers, H query heads, G key/value heads, R = H / G, K head width, F neurons, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.compress import prune
from llmctl.compress.calibrate import Batch, LayerReport, Visit, walk
from llmctl.compress.layer_files import Saved
from llmctl.compress.shrink import Kept, columns, cut, drop_layers
from llmctl.compress.statistics import Collect, Gram, Moments, Statistic, nothing
from llmctl.model import functional, hf_config, wiring
from llmctl.model.config import ModelConfig
from llmctl.model.weights import dense

Progress = Callable[[LayerReport], None] | None


def head_scores(gram: Gram, o: jax.Array) -> jax.Array:
    """Return ||X_h O_h||_F [H], each query head's contribution to the residual stream, for `o` [H*K, D]."""
    heads, width, _ = gram.products.shape
    o_HKD = o.astype(jnp.float32).reshape(heads, width, -1)
    square_H = jnp.einsum("hkl,hkd,hld->h", gram.products, o_HKD, o_HKD)
    return jnp.sqrt(jnp.maximum(square_H, 0.0))


def neuron_scores(stats: Moments, down: jax.Array) -> jax.Array:
    """Return ||x_f||_2 * ||down_f||_2 [F], each neuron's contribution to the residual stream, for `down` [F, D]."""
    return jnp.sqrt(stats.squares) * jnp.linalg.norm(down.astype(jnp.float32), axis=1)


def choose_heads(score_H: np.ndarray, groups: int, keep_groups: int, keep_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the query heads and of the key/value heads to keep, ascending.

    A group is a key/value head with its query heads. Every kept group keeps the same number of query heads. The best
    query heads of each group are selected first. Then the groups are selected, by the norm of the scores of these query
    heads.
    """
    each = keep_heads // keep_groups
    score_GR = score_H.reshape(groups, -1)
    best_GR = np.sort(_highest(score_GR, each), axis=1)
    group_G = np.sqrt(np.sum(np.square(np.take_along_axis(score_GR, best_GR, axis=1)), axis=1))
    kept = np.sort(_highest(group_G[None], keep_groups)[0])
    heads = (kept[:, None] * score_GR.shape[1] + best_GR[kept]).reshape(-1)
    return heads, kept


def choose_neurons(score_F: np.ndarray, keep: int) -> np.ndarray:
    """Return the indices of the `keep` neurons with the highest scores, ascending."""
    return np.sort(_highest(score_F[None], keep)[0])


def choose_layers(influence_L: Sequence[float], keep: int, kinds_L: Sequence[bool]) -> list[int]:
    """Return the indices of the `keep` layers with the highest total block influence, ascending.

    `kinds_L` tells whether each layer has local (true) or global attention. The config fixes the kind at each index, so
    the i-th kept layer must have the kind `kinds_L[i]`. If all layers have one kind, the layers with the highest
    influence are kept. The selection is exact, by dynamic programming.
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
    """Return the indices of the `keep` highest scores along the last axis. If scores are equal, the first is kept."""
    return np.argsort(-score, axis=-1, kind="stable")[..., :keep]


def prune_layers(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    target: ModelConfig,
    progress: Progress = None,
    dtype: Any = jnp.float32,
) -> tuple[ModelConfig, dict[str, Any], dict[str, list[int]]]:
    """Remove the layers with the least block influence, until the model has as many layers as `target`.

    (ShortGPT, arXiv:2403.03853)

    Returns:
      The config, the parameters, and the indices of the kept layers of the encoder and of the decoder.
    """
    _, reports = walk(cfg, params, batches, nothing, progress=progress, dtype=dtype)
    kept: dict[str, list[int]] = {}
    for stack in functional.stacks(cfg):
        influence = [r.influence for r in reports if r.stack == stack]
        kinds = hf_config.local_layers(cfg, len(influence))
        kept[stack] = choose_layers(influence, functional.depth(target, stack), kinds)
    return (*drop_layers(cfg, params, kept), kept)


def fewer_layers(cfg: ModelConfig, target: ModelConfig) -> bool:
    """Return whether the encoder or the decoder has fewer layers in `target` than in `cfg`."""
    return (target.layers, target.encoder_layers) != (cfg.layers, cfg.encoder_layers)


def narrower(cfg: ModelConfig, target: ModelConfig) -> bool:
    """Return whether a layer has fewer heads or neurons in `target` than in `cfg`."""
    return (target.heads, target.kv_heads, target.d_ff) != (cfg.heads, cfg.kv_heads, cfg.d_ff)


def collector(cfg: ModelConfig, target: ModelConfig) -> Collect:
    """Return the function that selects the statistics for pruning from `cfg` to `target` (see `Collect`).

    The statistics are Gram matrices to score heads, and sums of squares (`Moments`) to score neurons.
    """
    read = _read(cfg, target)

    def collect(path: str, inputs: int) -> Statistic | None:
        units = read.get(path)
        if units is None:
            return None
        return Moments.start(inputs) if units.width == 1 else Gram.start(inputs, units.count)

    return collect


def _read(cfg: ModelConfig, target: ModelConfig) -> dict[str, wiring.Units]:
    """Return which heads or neurons must be pruned, by the path of the matrix that reads them (such as "attn/o")."""
    heads = (target.heads, target.kv_heads) != (cfg.heads, cfg.kv_heads)
    found = {reader: u for stack in wiring.stacks(cfg) for u in wiring.units(cfg, stack) for reader in u.readers}
    neurons = {p for p, u in found.items() if not u.name.endswith("/heads")}
    return {p: u for p, u in found.items() if (target.d_ff != cfg.d_ff if p in neurons else heads)}


def prune_widths(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    target: ModelConfig,
    progress: Progress = None,
    dtype: Any = jnp.float32,
    saved: Saved | None = None,
) -> tuple[ModelConfig, dict[str, Any], list[LayerReport]]:
    """Reduce every layer to the heads, key/value heads and neurons of `target`. The layers' arrays are donated.

    Each layer selects its own heads and neurons. With relative positions, however, the layers of an encoder or decoder
    share one bias per head. All layers then keep the same self-attention heads, selected by scores that are normalized
    per layer and summed. Finished layers and their selections are written to `saved`.

    Returns:
      The config, the parameters, and a report per layer.
    """
    collect = collector(cfg, target)
    heads_change = (target.heads, target.kv_heads) != (cfg.heads, cfg.kv_heads)
    shared_bias = heads_change and cfg.positions == "relative"
    common = _common_heads(cfg, params, batches, collect, dtype) if shared_bias else {}

    def change(visit: Visit) -> dict[str, Any]:
        out = {name: dict(part) for name, part in visit.layer.items()}
        for path, stat in visit.stats.items():
            part, name = path.split("/")
            kernel = out[part][name]["kernel"]
            if isinstance(stat, Gram):
                own = part != "attn" or not common
                scores = np.asarray(head_scores(stat, dense(kernel))) if own else common[visit.stack]
                heads, groups = choose_heads(scores, cfg.kv_heads, target.kv_heads, target.heads)
                visit.notes[f"{part}/heads"], visit.notes[f"{part}/groups"] = heads.tolist(), groups.tolist()
                rows = columns(heads, cfg.head_dim)
            else:
                rows = choose_neurons(np.asarray(neuron_scores(stat, dense(kernel))), target.d_ff)
                visit.notes[f"{part}/neurons"] = rows.tolist()
            mask = np.zeros((kernel.shape[0], 1), bool)
            mask[rows] = True
            out[part][name] = {**out[part][name], "kernel": prune.apply(kernel, jnp.asarray(mask))}
        return out

    params, reports = walk(cfg, params, batches, collect, change, progress=progress, saved=saved, dtype=dtype)
    kept: Kept = {stack: {} for stack in functional.stacks(cfg)}
    for r in reports:
        for units, choice in r.notes.items():
            kept[r.stack].setdefault(units, []).append(np.asarray(choice))
    return (*cut(cfg, params, target, kept), reports)


def _common_heads(
    cfg: ModelConfig, params: dict[str, Any], batches: Sequence[Batch], collect: Collect, dtype: Any
) -> dict[str, np.ndarray]:
    """Return scores [H] of the self-attention heads, common to all layers: {"encoder" or "decoder": scores}.

    Scores are normalized to sum 1 in each layer, and then summed over the layers.
    """
    _, reports = walk(cfg, params, batches, collect, keep=True, dtype=dtype)
    scores = {stack: np.zeros(cfg.heads, np.float32) for stack in functional.stacks(cfg)}
    for r in reports:
        o = functional.layer_params(params, r.stack, r.layer)["attn"]["o"]["kernel"]
        score = np.asarray(head_scores(r.stats["attn/o"], dense(o)))
        scores[r.stack] += score / max(float(score.sum()), 1e-30)
    return scores
