"""Predict the latency of pruned models from a table of measured latencies of single layers.

The latency of a model is the sum of two parts:

- the fixed part: embeddings, output head, and the overhead of the program. The fixed part depends on the hidden width.
- the latency of each layer, which depends on the hidden width, the heads and the neurons.

Layers are measured for a few hidden widths: with fewer heads and all neurons, and with fewer neurons and all heads. The
latencies of attention and of the feed-forward layer are added. The latencies for other sizes are interpolated.

A few layers are compiled together, with a vocabulary of a few tokens. Several copies of these layers run one after the
other, with as many layers in total as the model. The weights are then read from the same level of the memory hierarchy
as in the model. A model that fits into a cache of the processor needs no copies.

Each measurement runs in alternation with a few layers of the unpruned model. The result is multiplied by (first
measurement of these layers) / (present measurement of these layers). Other work of the machine then slows all
measurements equally.

Finally, the unpruned model is measured. All predictions are multiplied by the ratio of measured to predicted latency of
this model. All latencies are in microseconds.

Shapes: S stacks, H hidden widths, G key/value heads, Q query heads per key/value head, F neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.structured_pruning.latency import Timing
from llmctl.compress.structured_pruning.layer_timing import LayerTimer
from llmctl.compress.structured_pruning.search_space import QUERIES, Space, count, with_sizes
from llmctl.model import functional
from llmctl.model.config import ModelConfig

Params = dict[str, Any]

FRACTIONS = (1, 1 / 2, 1 / 4)
"""Fractions of each size at which layers are measured, in addition to the smallest size."""


@dataclass(frozen=True)
class Grid:
    """Store the sizes at which layers are measured, ascending. The last value of each size is the value of the unpruned
    model.
    """

    hidden: list[int]
    groups: list[int]
    queries: list[int]
    neurons: list[int]

    @classmethod
    def of(cls, space: Space) -> Grid:
        """Return the grid of sizes for a budget search."""
        cfg, multiple = space.cfg, space.multiple
        neurons = list(range(multiple, cfg.d_ff, multiple)) or [cfg.d_ff]
        counts = (space.hidden, space.heads, space.queries, neurons)
        wholes = (cfg.d_model, cfg.kv_heads, count(cfg, QUERIES), cfg.d_ff)
        return cls(*(_points(own, whole) for own, whole in zip(counts, wholes, strict=True)))


@dataclass(frozen=True)
class LatencyTable:
    """Predict the latency of a model in microseconds.

    The prediction never decreases if a size of the model increases. To ensure this, each measurement is first replaced
    by the running maximum along each axis of the grid.
    """

    grid: Grid
    fixed_H: np.ndarray
    """Latency of the embeddings, the output head and the program's overhead, for each hidden width in the grid."""
    layers_SHGQF: np.ndarray
    """Latency of one layer of each stack, for each combination of sizes in the grid."""
    stacks: tuple[str, ...]
    """Stacks whose layers take time. While an encoder-decoder generates tokens, the encoder does not run."""
    factor: float = 1.0
    """Ratio of the unpruned model's measured latency to its prediction."""

    def __call__(self, model: ModelConfig) -> float:
        """Return the predicted latency of a model."""
        grid = self.grid
        points = grid.hidden, grid.groups, grid.queries, grid.neurons
        at = model.d_model, model.kv_heads, count(model, QUERIES), model.d_ff
        total = interpolate(points[:1], self.fixed_H, at[:1])
        for stack, layers in zip(self.stacks, self.layers_SHGQF, strict=True):
            total += functional.depth(model, stack) * interpolate(points, layers, at)
        return self.factor * total


def interpolate(points: Sequence[Sequence[int]], values: np.ndarray, at: Sequence[float]) -> float:
    """Interpolate values on a grid linearly along each axis. Beyond the ends of an axis, the end value is returned.

    >>> interpolate([[0, 2], [0, 10]], np.array([[0.0, 10.0], [2.0, 12.0]]), (1, 5))
    6.0
    """
    for axis, where in zip(points, at, strict=True):  # the first axis is removed each time
        if len(axis) == 1:
            values = values[0]
            continue
        right = int(np.clip(np.searchsorted(axis, where), 1, len(axis) - 1))
        share = np.clip((where - axis[right - 1]) / (axis[right] - axis[right - 1]), 0.0, 1.0)
        values = (1 - share) * values[right - 1] + share * values[right]
    return float(values)


def measure(
    cfg: ModelConfig, params: Params, rows: int, space: Space, timing: Timing, dtype: Any, saved: Measurements
) -> tuple[LatencyTable, float]:
    """Measure the table and the unpruned model.

    All measurements are saved, so that an interrupted run continues with the same numbers.

    Args:
      cfg: config of the model.
      params: parameters of the model. Only their shapes and types are read.
      rows: number of tokens in the vocabulary after pruning.
      space: sizes that the search allows.
      timing: description of the measurement.
      dtype: dtype of the computation.
      saved: measurements of an interrupted run.

    Returns:
      The table, and the measured latency of the unpruned model in microseconds.
    """
    grid = Grid.of(space)
    timed = LayerTimer(cfg, jax.eval_shape(lambda p: p, params), timing, dtype, saved)
    queries, tokens = count(cfg, QUERIES), {rows, cfg.vocab_size}
    fixed: dict[int, list[float]] = {n: [] for n in tokens}
    heads, neurons = [], []
    for hidden in grid.hidden:
        whole = with_sizes(cfg, layers=cfg.layers, heads=cfg.kv_heads, ffn=cfg.d_ff, hidden=hidden)
        overhead, own_S = timed.overhead(whole)
        for n in tokens:
            fixed[n].append(timed.one_layer(whole, n) - float(own_S.sum()))
        for groups, each in itertools.product(grid.groups, grid.queries):
            model = with_sizes(cfg, layers=cfg.layers, heads=groups, ffn=cfg.d_ff, hidden=hidden, queries=each)
            heads.append(own_S if (groups, each) == (cfg.kv_heads, queries) else timed.layers(model, overhead))
        for ffn in grid.neurons:
            model = with_sizes(cfg, layers=cfg.layers, heads=cfg.kv_heads, ffn=ffn, hidden=hidden)
            neurons.append(own_S if ffn == cfg.d_ff else timed.layers(model, overhead))
    shape = len(timed.stacks), len(grid.hidden)
    heads_SHGQ1 = np.array(heads).T.reshape(*shape, len(grid.groups), len(grid.queries), 1)
    neurons_SH11F = np.array(neurons).T.reshape(*shape, 1, 1, len(grid.neurons))
    layers_SHGQF = heads_SHGQ1 + neurons_SH11F - neurons_SH11F[..., -1:]
    table = LatencyTable(grid, _rising(np.array(fixed[rows]), 1), _rising(layers_SHGQF, 4), timed.stacks)
    parent = timed.complete()
    predicted = table(cfg) - table.fixed_H[-1] + max(0.0, fixed[cfg.vocab_size][-1])
    return replace(table, factor=parent / predicted), parent


def _rising(values: np.ndarray, axes: int) -> np.ndarray:
    """Return the running maximum along each of the last `axes` axes. Negative values become 0."""
    values = np.maximum(values, 0.0)
    for axis in range(values.ndim - axes, values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


def _points(counts: Sequence[int], whole: int) -> list[int]:
    """Return the counts of one size at which layers are measured, ascending.

    These are the smallest count, the full count `whole`, and the counts nearest to the `FRACTIONS` of `whole`.
    """
    near = {min(counts, key=lambda n, aim=share * whole: abs(n - aim)) for share in FRACTIONS}
    return sorted({min(counts), *near, whole})
