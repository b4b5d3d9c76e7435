"""Remove layers, hidden channels, heads and neurons of an artifact, while calibration data passes through the
model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration import calibration_data
from llmctl.compress.calibration.calibrate import LayerReport
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.structured_pruning import (
    budget,
    budget_scan,
    channel_choice,
    gates,
    latency_table,
    sizes,
    structured,
)
from llmctl.compress.structured_pruning.budget import TOLERANCE, UNITS, Kind
from llmctl.compress.structured_pruning.budget_scan import Scan
from llmctl.compress.structured_pruning.search_space import Size, Space, with_sizes
from llmctl.compress.structured_pruning.settings import StructuredSettings
from llmctl.compress.structured_pruning.shrink import drop_layers
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.evaluate.tasks.registry import of
from llmctl.model.config import ModelConfig

Params = dict[str, Any]


class Log(Protocol):
    """Log the steps of structured pruning: the layers that were visited, and the losses that were measured."""

    total: int
    """Number of steps that the stage logs in total."""

    def log_layer(self, report: LayerReport) -> None:
        """Log the report of one layer as the next step."""

    def log_next(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics as the next step."""

    def say(self, text: str) -> None:
        """Print a line."""


def prune_structure(
    config: StructuredSettings,
    base: Artifact,
    params: Params,
    target: ModelConfig,
    method: StructuredMethod,
    mesh: Mesh,
    *,
    saved: Saved,
    log: Log,
    scan: Scan | None = None,
) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """Prune layers first, then the hidden width, then heads and neurons.

    The order ensures that heads and neurons are scored on the inputs of the remaining layers. Each step runs the
    calibration data through the model. So that an interrupted run can resume, a step that changes layers saves each
    finished layer. A step that only measures layers saves the measurements at the end.

    Args:
      config: settings of the stage.
      base: artifact that is compressed.
      params: parameters of the model, with merged adapters. The parameters of the layers are donated.
      target: config of the model after pruning. The vocabulary is not pruned here.
      method: importance, and whether to repair matrices whose inputs are removed.
      mesh: the devices.
      saved: folder of finished layers and of measurements.
      log: log of the layers that are measured or pruned.
      scan: importance of all layers, heads, neurons and channels in the unpruned model, if a budget search measured it.

    Returns:
      The config, the parameters, and metrics: the indices of the kept parts, and the importance of all heads, neurons
        and channels.

    Raises:
      RequestError: If the calibration data cannot be read.
    """
    model, found, dtype, progress = base.model, dict[str, Any](), config.dtype, log.log_layer
    target = target.model_copy(update={"vocab_size": model.vocab_size})
    if not (structured.fewer_layers(model, target) or structured.narrower(model, target)) and (
        model.d_model == target.d_model
    ):
        return model, params, found
    batches = scan.batches if scan else calibration_data.load(config, base, mesh, labels=method.gradients)
    scores, measurements = scan.scores if scan else None, Measurements(saved.folder)

    def derivatives(units: dict[str, int], name: str) -> gates.Gates | None:
        if not method.gradients or scan:
            return None
        task = of(base.manifest)
        return gates.accumulate(task, model, params, batches, units, dtype, saved=measurements, name=name)

    if structured.fewer_layers(model, target) and scan and scores:
        found["layers_kept"] = kept = structured.kept_layers(model, target, scan.influence)
        found["influence"] = scan.influence
        scores = {stack: [scores[stack][i] for i in layers] for stack, layers in kept.items()}
        model, params = drop_layers(model, params, kept)
    elif structured.fewer_layers(model, target):
        model, params, found["layers_kept"], influence = structured.prune_layers(
            model, params, batches, target, progress, dtype, measurements
        )
        found["influence"] = influence
    if model.d_model != target.d_model:
        slopes = derivatives(channel_choice.gate_paths(model, params), "gates.channels")
        own = Saved(saved.folder.with_name("channels"))  # other layers than those of the next step
        model, params, found["channels"] = channel_choice.prune_channels(
            model, params, batches, target.d_model, method, progress, dtype, own, slopes,
            scan.channels_D if scan else None, measurements,
        )  # fmt: skip
    if structured.narrower(model, target):
        slopes = derivatives(structured.gates(model, target), "gates.units")
        model, params, reports = structured.prune_widths(
            model, params, batches, target, progress, dtype, saved, method, slopes, scores, measurements
        )
        found["layer_error"] = _errors(reports)
        found["units"] = [_units(r) for r in reports]
        found.setdefault("influence", {r.stack: [o.influence for o in reports if o.stack == r.stack] for r in reports})
    return model, params, found


def choose_sizes(
    config: StructuredSettings,
    base: Artifact,
    params: Params,
    asked: tuple[Kind, float],
    method: StructuredMethod,
    mesh: Mesh,
    *,
    rows: int,
    saved: Saved,
    log: Log,
    show: Callable[[Any], None],
) -> tuple[Scan, ModelConfig, dict[str, Any]]:
    """Choose the sizes that meet a budget with the lowest loss on the calibration data.

    All measurements are saved, so that an interrupted run can resume.

    Args:
      config: settings of the stage.
      base: artifact that is compressed.
      params: parameters of the model, with merged adapters.
      asked: kind and amount of the budget (`BudgetConfig.asked`).
      method: how the importance is measured.
      mesh: the devices.
      rows: number of tokens in the vocabulary after pruning.
      saved: folder of finished layers and of measurements.
      log: log of the layers and losses that were measured. `log.total` is set to the number of steps of the search and
          of the pruning together.
      show: function that prints the table of candidates.

    Returns:
      The measured importance, the config of the pruned model, and metrics (the candidates and the loss by size).

    Raises:
      RequestError: If no sizes meet the budget, or the calibration data cannot be read.
    """
    space, size, wanted = sizes.search(config, base, params, asked, method, mesh, rows)
    timed = dict[str, Any]()
    if asked[0] == "latency":
        size, wanted, timed = _latencies(config, base, params, space, rows, Measurements(saved.folder), log)
    before, done = search_steps(space, method), _most_steps(space, method)
    log.total = before + done
    batches = calibration_data.load(config, base, mesh, labels=True)
    scan = Scan(
        base.model, params, batches, of(base.manifest), config.dtype, saved=Measurements(saved.folder),
        note=log.log_next,
    )  # fmt: skip
    scan.loss(base.model)  # raises if the data has no targets, before anything else is measured
    scan = budget_scan.measure(scan, method, log.log_layer)

    def planned(count: int) -> None:
        nonlocal before
        before = search_steps(space, method, count)
        log.total = before + done

    found, curves = budget_scan.choose(scan, space, wanted, size, planned)
    best = ModelConfig.model_validate(found[0].model.model_dump())
    log.total = before + pruning_steps(base.model, best, method, known=True)
    if (reached := size(best)) < (1 - TOLERANCE) * wanted:
        unit = UNITS.get(asked[0], "")
        log.say(
            f"no sizes are within {TOLERANCE:.0%} of the budget of {wanted:,.0f}{unit}; the nearest have "
            f"{reached:,.0f}{unit}"
        )
    show(budget_scan.table(found, asked[0]))
    losses = {name: {str(n): round(loss, 5) for n, loss in curve.items()} for name, curve in curves.items()}
    about = {"kind": asked[0], "limit": wanted, "size": reached}
    about |= {"candidates": [c.record for c in found], "losses": losses}
    if timed:
        about["latency"] = timed | {"predicted_seconds": reached / 1e6}
    return scan, best, about


def _latencies(
    config: StructuredSettings, base: Artifact, params: Params, space: Space, rows: int, saved: Measurements, log: Log
) -> tuple[Size, float, dict[str, Any]]:
    """Measure latencies, and return (function that predicts the latency of a model, limit, metrics).

    Raises:
      RequestError: If no sizes meet the budget.
    """
    timing = sizes.timing(config, base)
    table, parent = latency_table.measure(base.model, params, rows, space, timing, config.dtype, saved)
    predicted = parent / table.factor
    log.say(
        f"latency ({timing}): {parent:,.0f} µs before pruning; the table of single layers predicts {predicted:,.0f} µs"
    )
    wanted = budget.limit(space, ("latency", config.budget.latency), table, parent)
    about = {"of": timing.phase, "batch_size": timing.rows, "context": timing.context}
    return table, wanted, about | {"table_seconds": predicted / 1e6, "unpruned_seconds": parent / 1e6}


def search_steps(space: Space, method: StructuredMethod, *candidates: int) -> int:
    """Return the number of layers and losses that a budget search logs.

    `candidates` is the number of candidates that the search measures; by default the maximum.
    """
    layers = space.cfg.layers + space.cfg.encoder_layers
    return layers + _channel_walks(method) * (layers + 1) + budget_scan.loss_steps(space, *candidates)


def _most_steps(space: Space, method: StructuredMethod) -> int:
    """Return the maximum number of layers that the pruning logs after a budget search."""
    whole = space.cfg
    least = with_sizes(whole, layers=whole.layers, heads=whole.kv_heads, ffn=1, hidden=min(space.hidden))
    return pruning_steps(whole, least, method, known=True)


def pruning_steps(model: ModelConfig, target: ModelConfig, method: StructuredMethod, *, known: bool = False) -> int:
    """Return the number of layer steps that `prune_structure` logs. `known` is true if a search measured the
    importance."""
    before, after = (cfg.layers + cfg.encoder_layers for cfg in (model, target))
    steps = before if structured.fewer_layers(model, target) and not known else 0
    if model.d_model != target.d_model:
        steps += (method.repair + (0 if known else _channel_walks(method))) * (after + 1)  # and the output head
    if structured.narrower(model, target):
        heads = (model.heads, model.kv_heads) != (target.heads, target.kv_heads)
        steps += after * (1 + (heads and model.positions == "relative" and not known))
    return steps


def _channel_walks(method: StructuredMethod) -> int:
    """Return the number of calibration walks that measure the importance of channels: 0 or 1."""
    return int(method.importance in ("contribution", "activation"))


def _errors(reports: list[LayerReport]) -> dict[str, list[float]]:
    """Return the relative output error of each pruned layer, as lists for the encoder and the decoder.

    The inputs of a layer come from the pruned layers before it.
    """
    return {s: [round(r.error, 6) for r in reports if r.stack == s] for s in dict.fromkeys(r.stack for r in reports)}


def _units(report: LayerReport) -> dict[str, Any]:
    """Return JSON data about one pruned layer.

    The data has the kept heads and neurons, the importance of all heads and neurons, and the layer's error.
    """
    kept = {name: choice for name, choice in report.notes.items() if name != "importance"}
    about = {"stack": report.stack, "layer": report.layer, "error": round(report.error, 6)}
    return {**about, "kept": kept, "importance": report.notes["importance"]}
