"""Remove layers, heads and neurons of a saved model, as calibration data passes through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress import calibration_data, gates, structured
from llmctl.compress.calibrate import LayerReport
from llmctl.compress.layer_files import Saved
from llmctl.compress.settings import CalibrationConfig
from llmctl.compress.structured_method import StructuredMethod
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
) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """Prune layers first, then heads and neurons, and return the config, the parameters and the metrics.

    The order ensures that heads and neurons are scored on the inputs of the remaining layers. Each of the two steps
    runs the calibration data through the model. The step for heads and neurons saves each finished layer, so that an
    interrupted run can resume. The step that selects layers starts again.

    Args:
      config: calibration settings.
      base: artifact of the saved model.
      params: parameters of the model, with merged adapters. Those of the layers are donated.
      target: config of the model after pruning.
      method: importance and compensation.
      mesh: the devices.
      saved: folder of finished layers.
      progress: function that is called with the report of each layer that was measured or pruned.

    Raises:
      RequestError: If the calibration data cannot be read.
    """
    model, found, dtype = base.model, dict[str, Any](), config.dtype
    batches = calibration_data.load(config, base, mesh, labels=method.gradients)
    if structured.fewer_layers(model, target):
        model, params, found["layers_kept"] = structured.prune_layers(
            model, params, batches, target, progress=progress, dtype=dtype
        )
    if structured.narrower(model, target):
        slopes: gates.Gates | None = None
        if method.gradients:
            read = structured.gates(model, target)
            slopes = gates.accumulate(of(base.manifest), model, params, batches, read, dtype)
        model, params, reports = structured.prune_widths(
            model, params, batches, target, progress, dtype, saved, method, slopes
        )
        found["layer_error"] = _errors(reports)
        found["units"] = [_units(r) for r in reports]
    return model, params, found


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
    """Return what one layer keeps and the importance of all its heads and neurons, as JSON data."""
    kept = {name: choice for name, choice in report.notes.items() if name != "importance"}
    about = {"stack": report.stack, "layer": report.layer, "error": round(report.error, 6)}
    return {**about, "kept": kept, "importance": report.notes["importance"]}
