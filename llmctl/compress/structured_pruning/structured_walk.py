"""Remove layers, hidden channels, heads and neurons of a saved model, as calibration data passes through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from rich.table import Table

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration import calibration_data
from llmctl.compress.calibration.calibrate import LayerReport
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.settings import CalibrationConfig
from llmctl.compress.structured_pruning import budget, budget_scan, channel_choice, gates, structured
from llmctl.compress.structured_pruning.budget_scan import Scan
from llmctl.compress.structured_pruning.shrink import drop_layers
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.registry import of
from llmctl.model import weights
from llmctl.model.config import ModelConfig

Params = dict[str, Any]


def prune_structure(
    config: CalibrationConfig,
    base: Artifact,
    params: Params,
    target: ModelConfig,
    method: StructuredMethod,
    mesh: Mesh,
    *,
    saved: Saved,
    progress: Callable[[LayerReport], None],
    scan: Scan | None = None,
) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """Prune layers first, then the hidden width, then heads and neurons.

    The order ensures that heads and neurons are scored on the inputs of the remaining layers. Each step runs the
    calibration data through the model. Steps that change layers save each finished layer, so that an interrupted run
    can resume. Steps that only measure layers start again.

    Args:
      config: calibration settings.
      base: artifact of the saved model.
      params: parameters of the model, with merged adapters. Those of the layers are donated.
      target: config of the model after pruning.
      method: importance and compensation.
      mesh: the devices.
      saved: folder of finished layers.
      progress: function that is called with the report of each layer that was measured or pruned.
      scan: importance of everything in the unpruned model, if it was measured to meet a budget.

    Returns:
      The config, the parameters, and metrics: what was kept, and the importance of all heads, neurons and channels.

    Raises:
      RequestError: If the calibration data cannot be read.
    """
    model, found, dtype = base.model, dict[str, Any](), config.dtype
    batches = scan.batches if scan else calibration_data.load(config, base, mesh, labels=method.gradients)
    scores = scan.scores if scan else None

    def derivatives(units: dict[str, int]) -> gates.Gates | None:
        if not method.gradients or scan:
            return None
        return gates.accumulate(of(base.manifest), model, params, batches, units, dtype)

    if structured.fewer_layers(model, target) and scan and scores:
        found["layers_kept"] = kept = structured.kept_layers(model, target, scan.influence)
        scores = {stack: [scores[stack][i] for i in layers] for stack, layers in kept.items()}
        model, params = drop_layers(model, params, kept)
    elif structured.fewer_layers(model, target):
        model, params, found["layers_kept"] = structured.prune_layers(
            model, params, batches, target, progress=progress, dtype=dtype
        )
    if model.d_model != target.d_model:
        slopes = derivatives(channel_choice.gate_paths(model, params))
        own = Saved(saved.folder.with_name("channels"))  # other layers than those of the next step
        model, params, found["channels"] = channel_choice.prune_channels(
            model, params, batches, target.d_model, method, progress, dtype, own, slopes,
            scan.channels_D if scan else None,
        )  # fmt: skip
    if structured.narrower(model, target):
        slopes = derivatives(structured.gates(model, target))
        model, params, reports = structured.prune_widths(
            model, params, batches, target, progress, dtype, saved, method, slopes, scores
        )
        found["layer_error"] = _errors(reports)
        found["units"] = [_units(r) for r in reports]
    return model, params, found


def choose_sizes(
    config: CalibrationConfig,
    base: Artifact,
    params: Params,
    asked: tuple[str, float],
    method: StructuredMethod,
    mesh: Mesh,
    *,
    multiple: int,
    progress: Callable[[LayerReport], None],
) -> tuple[Scan, ModelConfig, dict[str, Any], Table]:
    """Choose the sizes that meet a budget with the lowest loss on the calibration data.

    Args:
      config: calibration settings.
      base: artifact of the saved model.
      params: parameters of the model, with merged adapters.
      asked: kind and amount of the budget (`BudgetConfig.asked`).
      method: how the importance is measured.
      mesh: the devices.
      multiple: the numbers of neurons and channels are multiples of this number.
      progress: function that is called with the report of each layer that was measured.

    Returns:
      The measured importance, the config of the pruned model, metrics (the candidates and the loss by size), and a
      table of the candidates.

    Raises:
      RequestError: If no sizes meet the budget, or the calibration data cannot be read.
    """
    model = base.model
    size, wanted = budget_of(config, base, asked)
    batches = calibration_data.load(config, base, mesh, labels=True)
    scan = budget_scan.measure(of(base.manifest), model, params, batches, method, progress, config.dtype)
    found, curves = budget_scan.choose(scan, wanted, size, multiple)
    best = ModelConfig.model_validate(found[0].model.model_dump())
    losses = {name: {str(n): round(loss, 5) for n, loss in curve.items()} for name, curve in curves.items()}
    about = {"kind": asked[0], "limit": wanted, "size": size(best)}
    about |= {"candidates": [c.record for c in found], "losses": losses}
    return scan, best, about, budget_scan.table(found, asked[0])


def budget_of(
    config: CalibrationConfig, base: Artifact, asked: tuple[str, float]
) -> tuple[Callable[[ModelConfig], float], float]:
    """Return a function that computes a model's size in the unit of the budget, and the budget in this unit.

    Raises:
      RequestError: If the model already fits the budget, or if even the smallest choice of sizes does not fit.
    """
    size = budget.size_of(asked[0], base.manifest.bits, calibration_data.sequence_length(config, base))
    return size, budget.limit(base.model, asked, size)


def layer_steps(model: ModelConfig, target: ModelConfig, method: StructuredMethod) -> int:
    """Return the number of layers that `prune_structure` visits in all passes: the total of its progress bar."""
    before, after = (cfg.layers + cfg.encoder_layers for cfg in (model, target))
    steps = before if structured.fewer_layers(model, target) else 0
    if model.d_model != target.d_model:
        passes = (method.importance in ("contribution", "activation")) + method.repair
        steps += passes * (after + 1)  # and the output head
    return steps + (after if structured.narrower(model, target) else 0)


def check(base: Artifact, params: Params, method: StructuredMethod) -> None:
    """Check, before any computation, that the method fits the model.

    Raises:
      RequestError: If repair would change integers, or fill zeros that pruning made.
    """
    if not method.repair:
        return
    if base.manifest.pruned:
        raise RequestError(
            f"{base.path}: is pruned ({base.manifest.sparsity:.1%} zeros), and repair would fill the zeros; remove "
            "heads, neurons and channels first, or leave out repair"
        )
    for m in weights.matrices(params, "block"):
        if not weights.is_plain(m.weight):
            raise RequestError(
                f"{m.path} is quantized, and repair gives other values to the weights that it keeps; leave out repair, "
                "or prune the artifact that was quantized"
            )


def _errors(reports: list[LayerReport]) -> dict[str, list[float]]:
    """Return the relative output error of each pruned layer, as lists for the encoder and the decoder.

    The inputs of a layer come from the pruned layers before it.
    """
    return {s: [round(r.error, 6) for r in reports if r.stack == s] for s in dict.fromkeys(r.stack for r in reports)}


def _units(report: LayerReport) -> dict[str, Any]:
    """Return JSON data about one pruned layer: its kept heads and neurons, the importance of all, and its error."""
    kept = {name: choice for name, choice in report.notes.items() if name != "importance"}
    about = {"stack": report.stack, "layer": report.layer, "error": round(report.error, 6)}
    return {**about, "kept": kept, "importance": report.notes["importance"]}
