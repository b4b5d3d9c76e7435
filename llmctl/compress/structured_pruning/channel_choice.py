"""Select the channels of the residual stream to keep for a smaller hidden width, and compensate for removed channels.

All layers share the channels, and matrices read the channels from the outputs of norms. The importance of a channel is
therefore summed over the outputs of all norms. A first pass over the calibration data measures the unchanged model. If
the matrices are repaired, a second pass recomputes each matrix that reads the output of a norm. Each such matrix
becomes the least-squares solution on the kept channels.

Before pruning, a norm divides by the root mean square (RMS) of all channels. After pruning, it divides by the RMS of
the kept channels. If the matrices are repaired, the norm's scale is multiplied by RMS(kept) / RMS(all) to compensate.

Shapes: D hidden width, N tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.compress.calibration.calibrate import HEAD, Batch, LayerReport, Visit, walk
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.calibration.statistics import Collect, Gram, Joined, Moments, Norms, Statistic, Totals
from llmctl.compress.structured_pruning.channel_cut import cut_channels, hidden_axes
from llmctl.compress.structured_pruning.gates import Gates
from llmctl.compress.structured_pruning.importance import GRAM, SCORE, TOTALS
from llmctl.compress.structured_pruning.measured_walk import UNSAVED, Progress, measure
from llmctl.compress.structured_pruning.structured import disable
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.model import functional, weights, wiring
from llmctl.model.config import ModelConfig
from llmctl.model.weights import dense

Params = dict[str, Any]


def prune_channels(
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Batch],
    keep: int,
    method: StructuredMethod,
    progress: Progress = None,
    dtype: Any = jnp.float32,
    saved: Saved | None = None,
    found: Gates | None = None,
    known_D: np.ndarray | None = None,
    measurements: Measurements = UNSAVED,
) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """Reduce the hidden width to `keep` channels.

    Args:
      cfg: config of the model.
      params: parameters of the model. If `method.repair` is true, the parameters of the layers are donated.
      batches: calibration batches.
      keep: number of channels to keep.
      method: kind of the importance, and whether to repair.
      progress: function that is called with the report of each finished layer, in both passes.
      dtype: dtype of the computation.
      saved: folder in which repaired layers are saved.
      found: derivatives for the importance "taylor" (`gates.accumulate`).
      known_D: importance of the channels, if it was measured before.
      measurements: importance that an interrupted run measured.

    Returns:
      The config, the parameters, and JSON data: the indices of the kept channels, and the importance of all channels.
    """
    scores_D = known_D
    if scores_D is None:
        scores_D = channel_scores(cfg, params, batches, method, progress, dtype, found, measurements)
    kept = np.sort(np.argsort(-scores_D, kind="stable")[:keep])
    about = {"kept": kept.tolist(), "importance": [float(f"{x:.4g}") for x in scores_D]}
    ratios: dict[str, np.ndarray] = {}
    if method.repair:
        params, ratios = _compensated(cfg, params, batches, kept, method, progress, dtype, saved)
    return (*cut_channels(cfg, params, kept, ratios), about)


def norm_feeds(cfg: ModelConfig) -> list[wiring.Feed]:
    """Return the `Feed` (producer and readers) of each activation whose elements are the channels of the hidden width.

    Most of these activations are outputs of norms.
    """
    axes = hidden_axes(cfg)
    return [f for f in wiring.feeds(cfg) if _axis(f.readers[0]) in axes.get(_path(f.readers[0]), ())]


def gate_paths(cfg: ModelConfig, params: Params) -> dict[str, int]:
    """Return the number of gates per norm: {path of the norm's scale: hidden width}, one gate per channel.

    The result is the argument `units` of `gates.accumulate`. A norm is omitted if no matrix reads its output.
    """
    flat = weights.flatten(params)
    scales = {f"{feed.producer}/scale" for feed in norm_feeds(cfg)}
    return {path: cfg.d_model for path in sorted(scales) if path in flat}


def channel_scores(
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Batch],
    method: StructuredMethod,
    progress: Progress = None,
    dtype: Any = jnp.float32,
    found: Gates | None = None,
    saved: Measurements = UNSAVED,
    name: str = "channels",
) -> np.ndarray:
    """Return the importance of each channel, [D]. `prune_channels` describes the arguments.

    The importance is saved as `name`. If an interrupted run saved the importance, nothing is measured.
    """
    total_D, flat = np.zeros(cfg.d_model), weights.flatten(params)
    if method.importance == "random":
        return np.random.default_rng([method.seed, zlib.crc32(b"channels")]).random(cfg.d_model)
    if method.importance == "taylor":
        return sum((np.asarray(a, float).reshape(-1, cfg.d_model).sum(0) for a in (found or {}).values()), total_D)
    if method.importance == "magnitude":
        for path, axes in hidden_axes(cfg).items():
            for axis in axes if path in flat else ():
                square = np.square(np.asarray(dense(flat[path]), float))
                total_D += np.moveaxis(square, axis, -1).reshape(-1, cfg.d_model).sum(0)
        return np.sqrt(total_D)
    feeds = {(stack, name): feed for feed in norm_feeds(cfg) for stack, name in [_at(feed.readers[0])]}

    def reduce(reports: list[LayerReport]) -> dict[str, np.ndarray]:
        for r in reports:
            for path, joined in r.stats.items():
                stat: Any = joined.parts[SCORE]
                if method.importance == "activation":
                    total_D[:] += np.asarray(stat.sums, float)
                    continue
                readers = feeds[r.stack, path].readers
                square_D = np.asarray(stat.squares, float) * sum(_row_squares(flat, p, r.layer) for p in readers)
                total_D[:] += square_D / max(float(square_D.sum()), 1e-30)
        return {"scores": total_D}

    collect = collector(cfg, method)
    measured, _ = measure(name, saved, cfg, params, batches, collect, reduce, head=True, progress=progress, dtype=dtype)
    return measured["scores"]


def collector(cfg: ModelConfig, method: StructuredMethod) -> Collect:
    """Return the `Collect` function for the importance of channels.

    The function selects the sum of squares of each channel. For the importance "activation", the function selects the
    sum of magnitudes.
    """
    names = {_at(feed.readers[0])[1] for feed in norm_feeds(cfg)}

    def collect(path: str, inputs: int) -> Statistic | None:
        if path not in names or inputs != cfg.d_model:
            return None
        start = Norms.start(inputs, inputs) if method.importance == "activation" else Moments.start(inputs)
        return Joined({SCORE: start})

    return collect


def grams(cfg: ModelConfig) -> Collect:
    """Return the `Collect` function whose statistics repair needs.

    Repair recomputes matrices whose inputs were removed, by least squares. The function selects the matrices that read
    the output of a norm. For each such matrix, it collects the Gram matrix and the sum of the inputs.
    """
    names = {_at(feed.readers[0])[1] for feed in norm_feeds(cfg)}

    def collect(path: str, inputs: int) -> Statistic | None:
        if path not in names or inputs != cfg.d_model:
            return None
        return Joined({GRAM: Gram.start(inputs), TOTALS: Totals.start(inputs)})

    return collect


def _compensated(
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Batch],
    kept: np.ndarray,
    method: StructuredMethod,
    progress: Progress,
    dtype: Any,
    saved: Saved | None,
) -> tuple[Params, dict[str, np.ndarray]]:
    """Recompute the matrices that read the output of a norm, by least squares on the channels `kept`.

    `prune_channels` describes the other arguments.

    Returns:
      The parameters, and {path of a norm: factors by which the norm's scale must be multiplied}. The factors are an
      array [layers], or a scalar for a norm outside of the layers.
    """
    feeds = norm_feeds(cfg)
    flat = weights.flatten(params)
    norms = {*(feed.producer for feed in feeds), "embed/norm"}
    scales = {norm: np.asarray(flat[f"{norm}/scale"]) for norm in sorted(norms) if f"{norm}/scale" in flat}
    biases = {norm: np.asarray(flat[f"{norm}/bias"]) for norm in scales if f"{norm}/bias" in flat}

    def change(visit: Visit) -> Params:
        out = weights.flatten(visit.layer)
        for feed in feeds:
            stack, name = _at(feed.readers[0])
            measured = visit.stats.get(name) if stack == visit.stack else None
            if measured is None:
                continue
            for reader in feed.readers:
                own = _at(reader)[1]
                kernel, bias = f"{own}/kernel", f"{own}/bias"
                if kernel in out:  # a tied table is also the embedding, and stays as it is
                    layer = {"kernel": out[kernel]} | ({"bias": out[bias]} if bias in out else {})
                    new = disable(layer, kept, measured, method)
                    out |= {f"{own}/{part}": a for part, a in new.items()}
            norm, at = _norm_of(cfg, feed, visit)
            if norm in scales:
                bias_D = biases[norm][at] if norm in biases else np.zeros(1)
                # The input of the output projection is scaled after the norm.
                after = (cfg.logit_scale or cfg.d_model**-0.5) if name in ("embed/tokens", "lm_head") else 1.0
                visit.notes[norm] = [at, _ratio(cfg, measured, scales[norm][at], bias_D, after, kept)]
        return weights.unflatten(out)

    params, reports = walk(
        cfg, params, batches, grams(cfg), change, head=True, progress=progress, saved=saved, dtype=dtype
    )
    ratios = {norm: np.ones(scale.shape[:-1], np.float32) for norm, scale in scales.items()}
    for r in reports:
        for norm, (at, ratio) in r.notes.items():
            ratios[norm][tuple(at)] = ratio
    return params, ratios


def _norm_of(cfg: ModelConfig, feed: wiring.Feed, visit: Visit) -> tuple[str, tuple[int, ...]]:
    """Return (path, layer index) of the norm that produces an activation of the visited layer.

    The index is a tuple, and () for a norm outside of the layers.
    """
    norm = feed.producer
    if not norm:  # the layers of a post-norm model read the norm of the layer before
        norm = f"{visit.stack}/blocks/mlp_norm" if visit.index else "embed/norm"
        return norm, (visit.index - 1,) if visit.index else ()
    stack = weights.parse(f"{norm}/scale").stack
    if not stack:
        return norm, ()
    return norm, (visit.index if stack == visit.stack else functional.depth(cfg, stack) - 1,)


def _ratio(
    cfg: ModelConfig, measured: Joined, scale_D: np.ndarray, bias_D: np.ndarray, after: float, kept: np.ndarray
) -> float:
    """Return the factor by which a norm's scale must be multiplied after pruning: RMS(kept) / RMS(all channels).

    `measured` has the statistics of `after` times the norm's outputs. The factor `after`, the scale and the bias are
    first undone. The RMS of all channels is then 1, so the result is the RMS of the kept channels.
    """
    gram: Any = measured.parts[GRAM]
    sums: Any = measured.parts[TOTALS].sums
    count = max(float(gram.count), 1.0)
    square_D, mean_D = np.asarray(gram.squares, float) / count / after**2, np.asarray(sums, float) / count / after
    scale_D = scale_D.astype(float) + cfg.norm_plus_one
    square_D = square_D - 2 * bias_D * mean_D + bias_D**2
    share_D = np.where(np.abs(scale_D) > 1e-6, square_D / np.where(scale_D == 0, 1.0, scale_D) ** 2, 1.0)
    return float(np.sqrt(np.mean(share_D[kept])))


def _at(reader: str) -> tuple[str, str]:
    """Split the path of a matrix into a stack ("encoder", "decoder" or `HEAD`) and the path in a layer."""
    name = weights.parse(_path(reader))
    return (name.stack, name.module) if name.stacked else (HEAD, reader)


def _path(reader: str) -> str:
    """Return the path of a matrix's weight: `reader/kernel`. For the embedding table, return `reader`."""
    return reader if reader == "embed/tokens" else f"{reader}/kernel"


def _axis(reader: str) -> int:
    """Return the axis of a matrix's inputs: -1 for the embedding table, otherwise -2."""
    return -1 if reader == "embed/tokens" else -2


def _row_squares(flat: dict[str, Any], reader: str, layer: int) -> np.ndarray:
    """Return the sum of squares of each row of a matrix, [D]. A row contains the weights of one channel."""
    w = flat[_path(reader)]
    w = weights.layer_of(w, layer) if weights.is_stacked(_path(reader)) else w
    return np.square(np.asarray(dense(w), float)).sum(axis=0 if reader == "embed/tokens" else 1)
