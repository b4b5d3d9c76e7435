"""Measure what the removal of layers, heads, neurons and hidden channels costs, and choose sizes that meet a budget.

One pass of the calibration data measures the importance of everything in the unpruned model. Then each size alone is
reduced to a few counts, and the loss of the calibration data is measured: rows of the matrices that read heads and
neurons are set to zero, and channels are cut. A layer whose rows are all zero passes on its input, so it need not be
removed. A post-norm model would still apply the layer's norms, so its layers are removed. The candidates with the
lowest estimates, and the one with uniform ratios, are measured in the same way with all sizes reduced together. The
candidate with the lowest loss is chosen. It is pruned by the same importance, so that without repair its loss is the
measured one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.compress.calibration.calibrate import Batch, walk
from llmctl.compress.calibration.statistics import Statistic
from llmctl.compress.structured_pruning import budget, channel_choice, importance
from llmctl.compress.structured_pruning.budget import Candidate
from llmctl.compress.structured_pruning.channel_cut import cut_channels
from llmctl.compress.structured_pruning.gates import Gates, accumulate
from llmctl.compress.structured_pruning.shrink import columns, drop_layers
from llmctl.compress.structured_pruning.structured import (
    Progress,
    UnitScores,
    choose_heads,
    choose_neurons,
    common_scores,
    fewer_layers,
    kept_layers,
)
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.base import Task
from llmctl.model import functional, weights, wiring
from llmctl.model.config import ModelConfig

Params = dict[str, Any]

FINALISTS = 6
"""Number of candidates whose loss is measured, besides the one with uniform ratios."""


@dataclass(frozen=True)
class Scan:
    """Store the importance of a model's layers, heads, neurons and channels, and measure the loss without some."""

    cfg: ModelConfig
    params: Params
    batches: Sequence[Batch]
    task: Task
    dtype: Any
    influence: dict[str, list[float]]
    """Block influence of the layers, by stack."""
    scores: UnitScores
    """Importance of the heads and neurons."""
    channels_D: np.ndarray
    """Importance of the hidden channels."""
    programs: dict[tuple[int, int], Any] = field(default_factory=dict)
    """Compiled functions for the loss, by number of layers and hidden width."""

    def loss(self, model: ModelConfig) -> float:
        """Return the mean loss on the calibration data of the model, pruned to the sizes of `model`.

        The layers, heads, neurons and channels of lowest importance are disabled or removed, without repair.
        """
        cfg, params = self.cfg, weights.updated(self.params, self._masked(model))
        if cfg.norm_position == "post" and fewer_layers(cfg, model):
            cfg, params = drop_layers(cfg, params, kept_layers(cfg, model, self.influence))
        if model.d_model != cfg.d_model:
            kept = np.sort(np.argsort(-self.channels_D, kind="stable")[: model.d_model])
            cfg, params = cut_channels(cfg, params, kept)
        step = self.programs.setdefault((cfg.layers, cfg.d_model), loss_program(self.task, cfg, self.dtype))
        total = np.zeros(2)
        for batch in self.batches:
            total += np.asarray(step(params, batch), float)
        if not total[1]:
            raise RequestError("calibration has no labels or targets: a budget is met by the loss that they give")
        return float(total[0] / total[1])

    def _masked(self, model: ModelConfig) -> dict[str, Any]:
        """Return the matrices, by path, with zero rows for all heads, neurons and layers that `model` does not have.

        Unchanged matrices are omitted.
        """
        cfg, changed = self.cfg, {}
        flat = weights.flatten(self.params)
        for stack, layers in kept_layers(cfg, model, self.influence).items():
            influence = self.influence[stack]
            for units in wiring.units(cfg, stack):
                for path in units.readers:
                    mask = np.zeros((len(influence), units.count * units.width, 1), bool)
                    for i in layers:
                        mask[i, self._rows(units, self.scores[stack][i][path], model)] = True
                    if not mask.all():
                        kernel = f"{stack}/blocks/{path}/kernel"
                        changed[kernel] = weights.as_node(flat[kernel]).masked(jnp.asarray(mask))
                        bias = f"{stack}/blocks/{path}/bias"
                        if bias in flat and len(layers) < len(influence):
                            kept = np.isin(np.arange(len(influence)), layers)[:, None]
                            changed[bias] = jnp.where(jnp.asarray(kept), flat[bias], 0)
        return changed

    def _rows(self, units: wiring.Units, scores: np.ndarray, model: ModelConfig) -> np.ndarray:
        if units.name.endswith("/heads"):
            heads, _ = choose_heads(scores, self.cfg.kv_heads, model.kv_heads, model.heads)
            return columns(heads, units.width)
        return choose_neurons(scores, model.d_ff)


def measure(
    task: Task,
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Batch],
    method: StructuredMethod,
    progress: Progress = None,
    dtype: Any = jnp.float32,
) -> Scan:
    """Measure the importance of layers, heads, neurons and channels, all in the unpruned model."""
    gates: Gates = {}
    channels = channel_choice.gate_paths(cfg, params)
    if method.gradients:
        gates = accumulate(task, cfg, params, batches, {**unit_counts(cfg), **channels}, dtype)
    collect = collector(cfg, method)
    _, reports = walk(cfg, params, batches, collect, keep=True, progress=progress, dtype=dtype)
    scores: UnitScores = {stack: [] for stack in functional.stacks(cfg)}
    for r in reports:
        layer, own = functional.layer_params(params, r.stack, r.layer), {}
        for units in wiring.units(cfg, r.stack):
            for path in units.readers:
                gate = gates.get(f"{r.stack}/blocks/{path}/kernel")
                at = (r.stack, r.layer)
                gate_N = None if gate is None else gate[r.layer]
                own[path] = importance.of_units(method, units, layer, r.stats.get(path), gate_N, at)
        scores[r.stack].append(own)
    if cfg.positions == "relative":  # the layers of a stack share one bias per head
        for layers in scores.values():
            common_H = common_scores([layer["attn/o"] for layer in layers])
            layers[:] = [{**layer, "attn/o": common_H} for layer in layers]
    influence = {stack: [r.influence for r in reports if r.stack == stack] for stack in functional.stacks(cfg)}
    found = {path: gates[path] for path in channels} if method.gradients else None
    channels_D = channel_choice.channel_scores(cfg, params, batches, method, None, dtype, found)
    return Scan(cfg, params, batches, task, dtype, influence, scores, channels_D)


def collector(cfg: ModelConfig, method: StructuredMethod) -> Any:
    """Return the `Collect` function for the importance of heads and neurons.

    It selects the statistic of each matrix that reads the outputs of heads or neurons.
    """
    read = {reader: u for stack in wiring.stacks(cfg) for u in wiring.units(cfg, stack) for reader in u.readers}
    scored = StructuredMethod(method.importance)

    def collect(path: str, inputs: int) -> Statistic | None:
        return importance.statistic(scored, inputs, read[path].count) if path in read else None

    return collect


def unit_counts(cfg: ModelConfig) -> dict[str, int]:
    """Return {path of a matrix: number of heads or neurons whose outputs the matrix reads}."""
    return {
        f"{stack}/blocks/{path}/kernel": u.count
        for stack in wiring.stacks(cfg)
        for u in wiring.units(cfg, stack)
        for path in u.readers
    }


def choose(scan: Scan, wanted: float, size: Any, multiple: int = 1) -> tuple[list[Candidate], budget.Curves]:
    """Measure the loss of the best candidates and of uniform pruning, for a budget.

    Args:
      scan: importance in the unpruned model, and calibration batches.
      wanted: the budget, in the unit of `size`.
      size: function that computes the size of a model (`budget.size_of`).
      multiple: the numbers of neurons and channels are multiples of this number.

    Returns:
      The candidates, sorted by measured loss, and the measured losses if only one size is reduced.

    Raises:
      RequestError: If no choice of sizes meets the budget.
    """
    cfg, base = scan.cfg, scan.loss(scan.cfg)
    curves: dict[str, dict[int, float]] = {}
    for name, counts in budget.points(cfg, multiple).items():
        whole = {part: getattr(cfg, field) for part, field in budget.PARTS.items()}
        curves[name] = {n: max(0.0, scan.loss(budget.with_sizes(cfg, **{**whole, name: n})) - base) for n in counts}
    found = budget.candidates(cfg, wanted, size, curves, multiple)
    if not found:
        raise RequestError(f"budget: no choice of layers, heads, neurons and channels has at most {wanted:,.0f}")
    even = budget.uniform(cfg, wanted, size, multiple)
    tried = budget.finalists(found, FINALISTS)
    tried.append(Candidate(even, size(even), budget.estimate(cfg, even, curves)))
    done = [budget.measured(c, scan.loss(c.model) - base) for c in tried]
    return sorted(done, key=lambda c: c.measured if c.measured is not None else c.estimate), curves


def table(found: Sequence[Candidate], kind: str) -> Table:
    """Return a table of the candidates for the terminal: sizes, estimated loss and measured loss."""
    out = Table(title="candidates", title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("layers", "heads", "neurons", "hidden", kind, "estimated loss", "measured loss"):
        out.add_column(title, justify="right")
    for c in found:
        sizes = (c.model.layers, c.model.heads, c.model.d_ff, c.model.d_model)
        lost = "" if c.measured is None else f"+{c.measured:.4f}"
        out.add_row(*map(str, sizes), f"{c.size:,.0f}", f"+{c.estimate:.4f}", lost)
    return out


def loss_program(task: Task, cfg: ModelConfig, dtype: Any) -> Any:
    """Return a compiled function (parameters, batch) -> float32 [2]: the total loss and the total weight."""
    loss = task.loss_of(cfg, dtype=dtype)

    def run(params: Params, batch: Batch) -> jax.Array:
        total, found = loss(params, batch)
        return jnp.stack([total, found["weight"]]).astype(jnp.float32)

    return jax.jit(run)
