"""Report the pruning of each layer: zeros, errors of the outputs, and fallbacks of SparseGPT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.compress.calibration.calibrate import LayerReport
from llmctl.model import weights

Record = dict[str, Any]


def records(reports: Sequence[LayerReport]) -> list[Record]:
    """Return one dictionary of JSON data per pruned layer.

    Returns:
      {"stack", "layer", "sparsity", "error", "matrices"}. `sparsity` is the counted fraction of zeros of the layer's
      matrices. `error` is the relative error of the layer's output, on inputs from the pruned layers before it.
      `matrices` has the data of each matrix by its path, as `llmctl.compress.pruning.prune.prune_layer` returns it.
    """
    return [_record(r.stack, r.layer, r.notes["matrices"], {"error": round(r.error, 6)}) for r in reports]


def counted(params: dict[str, Any]) -> list[Record]:
    """Return one record per layer that was pruned without calibration: as in `records`, but without output errors."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for m in weights.matrices(params, "block"):
        zeros = np.asarray((m.node.values() == 0).sum(axis=(1, 2)))
        for i, count in enumerate(zeros):
            found.setdefault((m.stack, i), {})[m.module] = {"shape": list(m.weight.shape[1:]), "zeros": int(count)}
    return [_record(stack, layer, matrices, {}) for (stack, layer), matrices in found.items()]


def errors(layers: Sequence[Record]) -> dict[str, list[float]]:
    """Return the relative output errors of the layers: {"encoder" or "decoder": errors}.

    The dictionary is empty if no error was measured.
    """
    measured = [layer for layer in layers if "error" in layer]
    stacks = dict.fromkeys(layer["stack"] for layer in measured)
    return {stack: [layer["error"] for layer in measured if layer["stack"] == stack] for stack in stacks}


def fallbacks(layers: Sequence[Record]) -> list[str]:
    """Return one line per matrix for which damping values of SparseGPT failed: its layer, its path, and a message."""
    return [
        f"{layer['stack']} layer {layer['layer']}, {path}: fell back to {found['fallback']}"
        for layer in layers
        for path, found in layer["matrices"].items()
        if "fallback" in found
    ]


def table(layers: Sequence[Record]) -> Table:
    """Return a table of the pruned layers for the terminal, with one row per layer.

    The first columns are the sparsity and the error of the layer's output. Two more columns are the mean errors of the
    matrices' outputs after and before the repair. The last column names the matrices for which SparseGPT failed.
    Columns without values are omitted.
    """
    columns = {
        "layer": [f"{layer['stack']} {layer['layer']}" for layer in layers],
        "sparsity": [f"{layer['sparsity']:.2%}" for layer in layers],
        "output error": [f"{layer['error']:.4f}" if "error" in layer else "" for layer in layers],
        "matrices' error": [mean(layer, "error") for layer in layers],
        "before repair": [mean(layer, "error_before_repair") for layer in layers],
        "fell back": [", ".join(p for p, m in layer["matrices"].items() if "fallback" in m) for layer in layers],
    }
    return layer_table("pruned layers", columns)


def layer_table(title: str, columns: dict[str, list[str]]) -> Table:
    """Return a table with one row per layer. `columns` maps the title of each column to its cells.

    Columns that contain only empty strings are omitted.
    """
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    out = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        out.add_column(name, justify="left" if name in ("layer", "fell back") else "right")
    for row in zip(*shown.values(), strict=True):
        out.add_row(*row)
    return out


def _record(stack: str, layer: int, matrices: dict[str, Any], measured: dict[str, float]) -> Record:
    entries = sum(math.prod(found["shape"]) for found in matrices.values())
    zeros = sum(found["zeros"] for found in matrices.values())
    sparsity = round(zeros / max(entries, 1), 6)
    return {"stack": stack, "layer": layer, "sparsity": sparsity, **measured, "matrices": matrices}


def mean(layer: Record, name: str) -> str:
    """Format the mean of the field `name` over the matrices of a layer. Return "" if no matrix has the field."""
    values = [found[name] for found in layer["matrices"].values() if name in found]
    return f"{sum(values) / len(values):.4f}" if values else ""
