"""Measure how the loss grows if layers, heads, neurons or hidden channels are removed, and choose sizes for a budget.

The search has four steps:

- Measure the importance of all layers, heads, neurons and channels in the unpruned model.
- Reduce each size alone to a few counts, and measure the loss on the calibration data.
- Reduce all sizes together, and measure the loss of some candidates: those with the lowest estimates, and the one with
  uniform ratios.
- Choose the candidate with the lowest loss.

The final pruning uses the same importance. If pruning does not repair matrices, the pruned model therefore has the
measured loss.

To measure a loss, channels are removed from the arrays. Heads and neurons are disabled by zero rows in the matrices
that multiply their outputs. Layers are disabled by zero rows too. In a post-norm model, the norms of a disabled layer
would still change the hidden states. The layers of such a model are therefore removed.

Every measurement is saved. A resumed run measures only the missing values, and chooses the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.compress.calibration.calibrate import Batch, LayerReport
from llmctl.compress.calibration.calibration_loss import loss_program, mean_loss
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.calibration.statistics import Statistic
from llmctl.compress.structured_pruning import budget, channel_choice, importance
from llmctl.compress.structured_pruning.budget import UNITS, Candidate
from llmctl.compress.structured_pruning.channel_cut import cut_channels
from llmctl.compress.structured_pruning.gates import Gates, accumulate
from llmctl.compress.structured_pruning.measured_walk import UNSAVED, Progress, measure_once
from llmctl.compress.structured_pruning.measured_walk import measure as measured_walk
from llmctl.compress.structured_pruning.search_space import Size, Space
from llmctl.compress.structured_pruning.shrink import columns, drop_layers
from llmctl.compress.structured_pruning.structured import (
    UnitScores,
    choose_heads,
    choose_neurons,
    common_scores,
    fewer_layers,
    kept_layers,
)
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.evaluate.tasks.base import Task
from llmctl.model import layerwise, weights, wiring
from llmctl.model.config import ModelConfig

Params = dict[str, Any]
Note = Callable[[Mapping[str, float]], None] | None
"""Function that is called with the name and the value of each measured loss."""

FINALISTS = 6
"""Number of candidates whose loss is measured. The candidate with uniform ratios is not counted."""


@dataclass(frozen=True)
class Scan:
    """Store the importance of a model's layers, heads, neurons and channels, and measure the loss of pruned models."""

    cfg: ModelConfig
    params: Params
    batches: Sequence[Batch]
    task: Task
    dtype: Any
    influence: dict[str, list[float]] = field(default_factory=dict)
    """Block influence of the layers, by stack."""
    scores: UnitScores = field(default_factory=dict)
    """Importance of the heads and neurons."""
    channels_D: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Importance of the hidden channels."""
    saved: Measurements = UNSAVED
    """Losses that an interrupted run measured."""
    note: Note = None
    losses: dict[str, float] = field(default_factory=dict)
    """Losses that this run has measured or read: {name of the sizes: loss}."""
    programs: dict[tuple[int, int], Any] = field(default_factory=dict)
    """Compiled functions for the loss, by number of layers and hidden width."""

    def loss(self, model: ModelConfig) -> float:
        """Prune the model to the sizes of `model`, and return the mean loss on the calibration data.

        The layers, heads, neurons and channels of lowest importance are disabled or removed, without repair.

        Raises:
          RequestError: If the calibration data has no labels or targets.
        """
        name = self._name(model)
        if name not in self.losses:
            self.losses[name] = measure_once(self.saved, name, lambda: self._measured(model))
            if self.note is not None:
                self.note({"calibration_loss": self.losses[name]})
        return self.losses[name]

    def measured(self, model: ModelConfig) -> bool:
        """Return whether this run has measured or read the loss of a model with these sizes."""
        return self._name(model) in self.losses

    def _name(self, model: ModelConfig) -> str:
        sizes = model.layers, model.encoder_layers, model.heads, model.kv_heads, model.d_ff, model.d_model
        return ".".join(map(str, ("loss", *sizes)))

    def _measured(self, model: ModelConfig) -> float:
        cfg, params = self.cfg, weights.updated(self.params, self._masked(model))
        if cfg.norm_position == "post" and fewer_layers(cfg, model):
            cfg, params = drop_layers(cfg, params, kept_layers(cfg, model, self.influence))
        if model.d_model != cfg.d_model:
            kept = np.sort(np.argsort(-self.channels_D, kind="stable")[: model.d_model])
            cfg, params = cut_channels(cfg, params, kept)
        step = self.programs.setdefault((cfg.layers, cfg.d_model), loss_program(self.task, cfg, self.dtype))
        return mean_loss(step, params, self.batches)

    def _masked(self, model: ModelConfig) -> dict[str, Any]:
        """Return the matrices by path, with zero rows for the heads, neurons and layers that `model` does not have.

        Unchanged matrices are omitted.
        """
        cfg, changed = self.cfg, {}
        if model == cfg:
            return {}
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


def measure(scan: Scan, method: StructuredMethod, progress: Progress = None) -> Scan:
    """Measure the importance of layers, heads, neurons and channels, all in the unpruned model.

    Args:
      scan: the model and the data. Its importance is not set yet.
      method: kind of the importance.
      progress: function that is called with the report of each layer.

    Returns:
      The scan with the importance.
    """
    cfg, params, dtype, saved = scan.cfg, scan.params, scan.dtype, scan.saved
    gates: Gates = {}
    channels = channel_choice.gate_paths(cfg, params)
    if method.gradients:
        units = {**unit_counts(cfg), **channels}
        gates = accumulate(scan.task, cfg, params, scan.batches, units, dtype, saved=saved, name="scan.gates")

    def reduce(reports: list[LayerReport]) -> dict[str, np.ndarray]:
        found = {}
        for r in reports:
            layer = layerwise.layer_params(params, r.stack, r.layer)
            for units in wiring.units(cfg, r.stack):
                for path in units.readers:
                    gate = gates.get(f"{r.stack}/blocks/{path}/kernel")
                    gate_N = None if gate is None else gate[r.layer]
                    at = (r.stack, r.layer)
                    own = importance.of_units(method, units, layer, r.stats.get(path), gate_N, at)
                    found[f"{r.stack}.{r.layer}.{path}"] = own
        return found

    collect = collector(cfg, method)
    found, influence = measured_walk(
        "scan.units", saved, cfg, params, scan.batches, collect, reduce, progress=progress, dtype=dtype
    )
    scores: UnitScores = {stack: [{} for _ in values] for stack, values in influence.items()}
    for name, own in found.items():
        stack, i, path = name.split(".", 2)
        scores[stack][int(i)][path] = own
    if cfg.positions == "relative":  # the layers of a stack share one bias per head
        for layers in scores.values():
            common_H = common_scores([layer["attn/o"] for layer in layers])
            layers[:] = [{**layer, "attn/o": common_H} for layer in layers]
    own_gates = {path: gates[path] for path in channels} if method.gradients else None
    channels_D = channel_choice.channel_scores(
        cfg, params, scan.batches, method, progress, dtype, own_gates, saved, "scan.channels"
    )
    return replace(scan, influence=influence, scores=scores, channels_D=channels_D)


def collector(cfg: ModelConfig, method: StructuredMethod) -> Any:
    """Return the `Collect` function for the importance of heads and neurons.

    The function selects the statistic of each matrix that reads the outputs of heads or neurons.
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


def loss_steps(space: Space, count: int = FINALISTS + 1) -> int:
    """Return the number of losses that `choose` measures for `count` candidates."""
    return 1 + sum(map(len, space.points().values())) + count


def choose(
    scan: Scan, space: Space, wanted: float, size: Size, planned: Callable[[int], None] | None = None
) -> tuple[list[Candidate], budget.Curves]:
    """Measure the loss of candidates that meet a budget.

    The candidates with the lowest estimates and the candidate with uniform ratios are measured.

    Args:
      scan: importance in the unpruned model, and calibration batches.
      space: the sizes that are allowed. At least one choice of sizes meets the budget (`budget.limit`).
      wanted: the budget, in the unit of `size`.
      size: function that computes the size of a model.
      planned: function that is called with the number of losses that remain to be measured.

    Returns:
      The candidates, sorted by measured loss, and the measured increases of the loss if only one size is reduced.
    """
    cfg, base = scan.cfg, scan.loss(scan.cfg)
    curves: dict[str, dict[int, float]] = {
        name: {n: max(0.0, scan.loss(space.one(name, n)) - base) for n in counts}
        for name, counts in space.points().items()
    }
    even = space.uniform(wanted, size)
    tried = budget.finalists(budget.candidates(space, wanted, size, curves), FINALISTS)
    if all(c.model != even for c in tried):
        tried.append(Candidate(even, size(even), budget.estimate(cfg, even, curves)))
    if planned is not None:
        planned(sum(not scan.measured(c.model) for c in tried))
    done = [budget.measured(c, scan.loss(c.model) - base) for c in tried]
    return sorted(done, key=lambda c: c.measured if c.measured is not None else c.estimate), curves


def table(found: Sequence[Candidate], kind: str) -> Table:
    """Return a table of the candidates for the terminal: sizes, estimated loss and measured loss."""
    out = Table(title="candidates", title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    size = kind + UNITS.get(kind, "")
    for title in ("layers", "heads", "kv heads", "neurons", "hidden", size, "estimated loss", "measured loss"):
        out.add_column(title, justify="right")
    for c in found:
        sizes = (c.model.layers, c.model.heads, c.model.kv_heads, c.model.d_ff, c.model.d_model)
        lost = "" if c.measured is None else f"+{c.measured:.4f}"
        out.add_row(*map(str, sizes), f"{c.size:,.0f}", f"+{c.estimate:.4f}", lost)
    return out
