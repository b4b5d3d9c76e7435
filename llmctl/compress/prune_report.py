"""Report what pruning did to each layer: zeros, errors of the outputs, and fallbacks of SparseGPT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmctl.compress.calibrate import LayerReport


def records(reports: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """Return one record per pruned layer as JSON data.

    Returns:
      {"stack", "layer", "sparsity", "error", "matrices"}. `sparsity` is the counted fraction of zeros of the layer's
      matrices. `error` is the relative error of the layer's output, on inputs from the pruned layers before it.
      `matrices` has the record of each matrix by its path, as `llmctl.compress.prune.prune_layer` returns it.
    """
    return [
        {
            "stack": report.stack,
            "layer": report.layer,
            "sparsity": _sparsity(report.notes["matrices"]),
            "error": round(report.error, 6),
            "matrices": report.notes["matrices"],
        }
        for report in reports
    ]


def fallbacks(layers: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per matrix that was pruned by a fallback: the path of the matrix, and the fallback."""
    return [
        f"{layer['stack']} layer {layer['layer']}, {path}: fell back to {found['fallback']}"
        for layer in layers
        for path, found in layer["matrices"].items()
        if "fallback" in found
    ]


def _sparsity(matrices: dict[str, dict[str, Any]]) -> float:
    sizes = {path: math.prod(found["shape"]) for path, found in matrices.items()}
    return round(sum(found["zeros"] for found in matrices.values()) / max(sum(sizes.values()), 1), 6)
