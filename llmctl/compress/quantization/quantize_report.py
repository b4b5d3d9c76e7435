"""Report the calibrated quantization of each layer: errors of the outputs and weights, and fallbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from llmctl.compress.calibration.calibrate import LayerReport
from llmctl.compress.pruning.prune_report import Record, layer_table, mean
from llmctl.compress.quantization.quantize_walk import full_path
from llmctl.model import weights


def records(reports: Sequence[LayerReport]) -> list[Record]:
    """Return one dictionary of JSON data per quantized layer.

    Returns:
      {"stack", "layer", "error", "matrices"}. `error` is the relative error of the layer's output, on inputs from the
      quantized layers before it. `matrices` has the data of each matrix by its path, as
      `llmctl.compress.quantization.quantize_walk.quantize_layer` returns it.
    """
    return [
        {"stack": r.stack, "layer": r.layer, "error": round(r.error, 6), "matrices": r.notes["matrices"]}
        | ({"tuning": r.notes["tuning"]} if r.notes.get("tuning") else {})
        for r in reports
    ]


def weight_errors(layers: Sequence[Record]) -> dict[str, float]:
    """Return the largest relative error of each weight among the layers, by its path in the model."""
    found: dict[str, float] = {}
    for layer in layers:
        for module, matrix in layer["matrices"].items():
            path = weights.kernel_of(full_path(layer["stack"], module))
            found[path] = max(found.get(path, 0.0), matrix["weight_error"])
    return found


def unscaled(layers: Sequence[Record]) -> list[str]:
    """Return one line per stack (encoder, decoder) about matrices whose inputs could not be scaled.

    The line lists these matrices. A line is omitted if all inputs of the stack could be scaled.
    """
    found: dict[str, dict[str, None]] = {}
    for layer in layers:
        for path, matrix in layer["matrices"].items():
            if "unscaled" in matrix:
                found.setdefault(layer["stack"], {})[path] = None
    return [
        f"{stack}: no scales for {', '.join(paths)}, because no norm or matrix before them can take the scales"
        for stack, paths in found.items()
    ]


def table(layers: Sequence[Record]) -> Table:
    """Return a table of the quantized layers for the terminal, with one row per layer.

    The columns are the error of the layer's output, and the mean errors of its matrices' outputs and weights. The last
    column names the matrices for which the requested method or a damping value failed.
    """
    columns: dict[str, list[Any]] = {
        "layer": [f"{layer['stack']} {layer['layer']}" for layer in layers],
        "output error": [f"{layer['error']:.4f}" for layer in layers],
        "matrices' error": [mean(layer, "error") for layer in layers],
        "weights' error": [mean(layer, "weight_error") for layer in layers],
        "fell back": [", ".join(p for p, m in layer["matrices"].items() if "fallback" in m) for layer in layers],
    }
    return layer_table("quantized layers", columns)
