"""Prune attention heads, feed-forward neurons and layers, so that arrays become smaller (structured pruning).

All layers of an encoder or decoder keep equally many heads and neurons, because `lax.scan` runs the layers. Each layer
selects its own heads and neurons, by their importance (`llmctl.compress.structured_pruning.importance`). The layers are
processed in order. A removed head or neuron is first disabled by zero rows in the matrix that reads its output. Later
layers therefore select by the inputs that they will have after pruning. The arrays are reduced at the end.

Shapes: L layers, H query heads, G key/value heads, R = H / G, K head width, F neurons, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.compress.calibration.calibrate import Batch, LayerReport, Visit, walk
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.calibration.output_error import replicated
from llmctl.compress.calibration.statistics import Collect, Joined, Statistic, Stats, nothing
from llmctl.compress.pruning import prune
from llmctl.compress.structured_pruning import importance
from llmctl.compress.structured_pruning.compensation import compensate
from llmctl.compress.structured_pruning.gates import Gates
from llmctl.compress.structured_pruning.measured_walk import UNSAVED, Progress, measure
from llmctl.compress.structured_pruning.shrink import Kept, columns, cut, drop_layers
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.model import functional, layerwise, wiring
from llmctl.model.config import ModelConfig

UnitScores = dict[str, list[dict[str, np.ndarray]]]
"""Importance of heads and neurons: "encoder" or "decoder" -> index of the layer -> path of a matrix -> scores.
The matrix, such as "attn/o", reads the outputs of the heads or neurons that have these scores."""


def choose_heads(score_H: np.ndarray, groups: int, keep_groups: int, keep_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the query heads and of the key/value heads to keep, ascending.

    A group is a key/value head with its query heads. Every kept group keeps the same number of query heads. The query
    heads with the highest scores in each group are selected first. Then the groups are selected, by the norm of the
    scores of these query heads.
    """
    each = keep_heads // keep_groups
    score_GR = score_H.reshape(groups, -1)
    best_GR = np.sort(_highest(score_GR, each), axis=1)
    group_G = np.sqrt(np.sum(np.square(np.take_along_axis(score_GR, best_GR, axis=1)), axis=1))
    kept = np.sort(_highest(group_G[None], keep_groups)[0])
    heads = (kept[:, None] * score_GR.shape[1] + best_GR[kept]).reshape(-1)
    return heads, kept


def choose_neurons(score_F: np.ndarray, keep: int) -> np.ndarray:
    """Return the indices of the `keep` neurons with the highest scores. The indices are in ascending order."""
    return np.sort(_highest(score_F[None], keep)[0])


def choose_layers(influence_L: Sequence[float], keep: int, kinds_L: Sequence[bool]) -> list[int]:
    """Return the indices of the `keep` layers with the highest total block influence. The indices are in ascending
    order.

    `kinds_L` is true for layers with local attention, and false for layers with global attention. The config fixes the
    kind at each index, so the i-th kept layer must have the kind `kinds_L[i]`. If all layers have one kind, the layers
    with the highest influence are kept. The selection is exact, by dynamic programming.
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
    measurements: Measurements = UNSAVED,
) -> tuple[ModelConfig, dict[str, Any], dict[str, list[int]], dict[str, list[float]]]:
    """Remove the layers with the least block influence, until the model has as many layers as `target`.

    ShortGPT (arXiv:2403.03853) introduced this method.

    Returns:
      The config, the parameters, the indices of the kept layers by stack, and the influence of all layers by stack.
    """
    _, influence = measure(
        "layers", measurements, cfg, params, batches, nothing, lambda _: {}, progress=progress, dtype=dtype
    )
    kept = kept_layers(cfg, target, influence)
    return (*drop_layers(cfg, params, kept), kept, influence)


def kept_layers(cfg: ModelConfig, target: ModelConfig, influence: dict[str, list[float]]) -> dict[str, list[int]]:
    """Return the indices of the layers with the highest block influence, by stack, as many as `target` has."""
    kept = {}
    for stack, values in influence.items():
        kinds = cfg.local_layers(len(values))
        kept[stack] = choose_layers(values, functional.depth(target, stack), kinds)
    return kept


def fewer_layers(cfg: ModelConfig, target: ModelConfig) -> bool:
    """Return whether the encoder or the decoder has fewer layers in `target` than in `cfg`."""
    return (target.layers, target.encoder_layers) != (cfg.layers, cfg.encoder_layers)


def narrower(cfg: ModelConfig, target: ModelConfig) -> bool:
    """Return whether a layer has fewer heads or neurons in `target` than in `cfg`."""
    return (target.heads, target.kv_heads, target.d_ff) != (cfg.heads, cfg.kv_heads, cfg.d_ff)


def readers(cfg: ModelConfig, target: ModelConfig, stack: str) -> dict[str, wiring.Units]:
    """Return {path of a matrix whose inputs are pruned ("attn/o"): heads or neurons whose outputs are these inputs}."""
    heads = (target.heads, target.kv_heads) != (cfg.heads, cfg.kv_heads)
    found = {reader: u for u in wiring.units(cfg, stack) for reader in u.readers}
    return {p: u for p, u in found.items() if (heads if u.name.endswith("/heads") else target.d_ff != cfg.d_ff)}


def collector(cfg: ModelConfig, target: ModelConfig, method: StructuredMethod = StructuredMethod()) -> Collect:
    """Return the `Collect` function of structured pruning from `cfg` to `target`.

    The function selects the statistics of each matrix whose inputs are pruned.
    """
    read = {path: u for stack in wiring.stacks(cfg) for path, u in readers(cfg, target, stack).items()}

    def collect(path: str, inputs: int) -> Statistic | None:
        units = read.get(path)
        return None if units is None else importance.statistic(method, inputs, units.count)

    return collect


def gates(cfg: ModelConfig, target: ModelConfig) -> dict[str, int]:
    """Return the number of gates per matrix: {path of the matrix: number of heads or neurons}.

    The matrix reads the outputs of these heads or neurons. Each head or neuron has one gate. The result is the argument
    `units` of `gates.accumulate`. A matrix is omitted if `target` keeps all of its heads or neurons.
    """
    return {
        f"{stack}/blocks/{path}/kernel": units.count
        for stack in wiring.stacks(cfg)
        for path, units in readers(cfg, target, stack).items()
    }


def prune_widths(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    target: ModelConfig,
    progress: Progress = None,
    dtype: Any = jnp.float32,
    saved: Saved | None = None,
    method: StructuredMethod = StructuredMethod(),
    found: Gates | None = None,
    known: UnitScores | None = None,
    measurements: Measurements = UNSAVED,
) -> tuple[ModelConfig, dict[str, Any], list[LayerReport]]:
    """Reduce every layer to the heads, key/value heads and neurons of `target`.

    Each layer selects its own heads and neurons. With relative positions, however, the layers of an encoder or decoder
    share one bias per head. All layers then keep the same self-attention heads, selected by scores that are normalized
    per layer and summed.

    Args:
      cfg: config of the model.
      params: parameters of the model. The parameters of the layers are donated.
      batches: calibration batches.
      target: config of the model after pruning.
      progress: function that is called with the report of each layer.
      dtype: dtype of the computation.
      saved: folder in which finished layers and their selections are saved.
      method: importance and repair.
      found: derivatives for the importance "taylor" (`gates.accumulate`).
      known: importance of heads and neurons, if it was measured before.
      measurements: importance that an interrupted run measured.

    Returns:
      The config, the parameters, and a report per layer. The notes of a report have the indices of the kept heads and
      neurons. The entry "importance" has the scores of all heads and neurons.
    """
    collect = collector(cfg, target, method)
    heads_change = (target.heads, target.kv_heads) != (cfg.heads, cfg.kv_heads)

    def score(stack: str, index: int, layer: dict[str, Any], stats: Stats, path: str) -> np.ndarray:
        if known is not None:
            return known[stack][index][path]
        own = (found or {}).get(f"{stack}/blocks/{path}/kernel")
        units = readers(cfg, target, stack)[path]
        own_N = None if own is None else own[index]
        return importance.of_units(method, units, layer, stats.get(path), own_N, (stack, index))

    def in_common(reports: list[LayerReport]) -> dict[str, np.ndarray]:
        each: dict[str, list[np.ndarray]] = {stack: [] for stack in functional.stacks(cfg)}
        for r in reports:
            layer = layerwise.layer_params(params, r.stack, r.layer)
            each[r.stack].append(score(r.stack, r.layer, layer, r.stats, "attn/o"))
        return {stack: common_scores(scores) for stack, scores in each.items()}

    common: dict[str, np.ndarray] = {}
    if heads_change and cfg.positions == "relative" and known is None:
        common, _ = measure(
            "heads", measurements, cfg, params, batches, collect, in_common, progress=progress, dtype=dtype
        )

    def change(visit: Visit) -> dict[str, Any]:
        out = {name: dict(part) for name, part in visit.layer.items()}
        for path, units in readers(cfg, target, visit.stack).items():
            part, name = path.split("/")
            if part == "attn" and common:
                scores = common[visit.stack]
            else:
                scores = score(visit.stack, visit.index, visit.layer, visit.stats, path)
            if units.name.endswith("/heads"):
                heads, groups = choose_heads(scores, cfg.kv_heads, target.kv_heads, target.heads)
                visit.notes[f"{part}/heads"], visit.notes[f"{part}/groups"] = heads.tolist(), groups.tolist()
                rows = columns(heads, cfg.head_dim)
            else:
                rows = choose_neurons(scores, target.d_ff)
                visit.notes[f"{part}/neurons"] = rows.tolist()
            visit.notes.setdefault("importance", {})[units.name] = [float(f"{x:.4g}") for x in scores]
            out[part][name] = disable(out[part][name], rows, visit.stats.get(path), method)
        return out

    params, reports = walk(cfg, params, batches, collect, change, progress=progress, saved=saved, dtype=dtype)
    kept: Kept = {stack: {} for stack in functional.stacks(cfg)}
    for r in reports:
        for units, choice in r.notes.items():
            if units != "importance":
                kept[r.stack].setdefault(units, []).append(np.asarray(choice))
    return (*cut(cfg, params, target, kept), reports)


def common_scores(scores_LH: Sequence[np.ndarray]) -> np.ndarray:
    """Return one score per head for all layers together, [H].

    The scores of each layer are divided by their sum, and then added over layers.
    """
    total_H = np.zeros(len(scores_LH[0]), np.float32)
    for scores_H in scores_LH:
        total_H += scores_H / max(float(scores_H.sum()), 1e-30)
    return total_H


def disable(
    dense: dict[str, Any], kept: np.ndarray, measured: Joined | None, method: StructuredMethod
) -> dict[str, Any]:
    """Return a dense layer (matrix and bias) with zero rows for all inputs except `kept`.

    If `method.repair` is true, the kept rows and the bias are recomputed from the statistics `measured`, to compensate.
    """
    kernel = dense["kernel"]
    if method.repair and measured is not None:
        gram = measured.parts[importance.GRAM]
        sums_I = measured.parts[importance.TOTALS].sums
        read = (replicated(a) for a in (kernel, dense.get("bias"), gram.products[0], sums_I, gram.count))
        w_IO, bias_O, gram_II, sums_I, count = read
        kernel, bias = compensate(w_IO, bias_O, kept, gram_II, sums_I, count)
        return {**dense, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    mask = np.zeros((kernel.shape[0], 1), bool)
    mask[kept] = True
    return {**dense, "kernel": prune.apply(kernel, jnp.asarray(mask))}
