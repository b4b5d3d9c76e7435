"""Quantize a saved model with calibration data, layer by layer as the data passes through.

The inputs of a layer come from the quantized layers before it. Token tables have no inputs, and are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress import calibration_data, gptq, grids, quantize
from llmctl.compress.calibrate import LayerReport, Visit, walk
from llmctl.compress.grids import GRIDS
from llmctl.compress.layer_files import Saved
from llmctl.compress.output_error import replicated, rounded_error
from llmctl.compress.quantize_method import Quantization
from llmctl.compress.settings import CalibrationConfig
from llmctl.compress.statistics import Statistic, Stats, grams
from llmctl.model import weights
from llmctl.model.weights import Matrix, Node, Weight

Params = dict[str, Any]
NO_INPUTS = "rounding to nearest: no calibration inputs"
"""Fallback for a matrix whose inputs the walk does not collect."""


def quantize_layers(
    config: CalibrationConfig,
    base: Artifact,
    params: Params,
    method: Quantization,
    mesh: Mesh,
    *,
    saved: Saved,
    progress: Callable[[LayerReport], None],
) -> tuple[Params, list[LayerReport], dict[str, float]]:
    """Return the quantized parameters, the report of each layer, and the relative error of each token table by path.

    Finished layers are saved, so that an interrupted run can resume.

    Args:
      config: calibration settings.
      base: artifact of the saved model.
      params: parameters of the model, with merged adapters. Those of the layers are donated.
      method: how the model is quantized.
      mesh: the devices.
      saved: folder of finished layers.
      progress: function that is called with the report of each layer.

    Raises:
      RequestError: If a weight cannot be quantized, or the calibration data cannot be read.
    """
    which = {"embeddings": method.embeddings, "head": method.head}
    quantize.chosen(weights.flatten(params), method.inputs, **which)
    batches = calibration_data.load(config, base, mesh)

    def change(visit: Visit) -> Params:
        layer, visit.notes["matrices"] = quantize_layer(visit.layer, visit.stats, method)
        return layer

    params, reports = walk(
        base.model, params, batches, collect, change,
        head=method.head, progress=progress, saved=saved, dtype=config.dtype,
    )  # fmt: skip
    flat, errors = weights.flatten(params), {}
    for m in weights.matrices(params, "embedding") if method.embeddings else ():
        flat[m.path], error = quantize.measured(m.weight, method.scheme, m.inputs, method.inputs, method.clip)
        errors[m.path] = float(error)
    return weights.unflatten(flat), reports, errors


def collect(path: str, inputs: int) -> Statistic | None:
    """Return an empty Gram for every matrix but the token table, which is also rounded if it is the output projection.

    This is a `Collect` function, an argument of `llmctl.compress.calibrate.walk`.
    """
    return None if path == "embed/tokens" else grams(path, inputs)


def quantize_layer(layer: Params, stats: Stats, method: Quantization) -> tuple[Params, dict[str, Any]]:
    """Quantize every matrix of one layer ({"attn": {"q": {"kernel": ...}}, ...}). Biases and norms do not change.

    Args:
      layer: parameters of the layer.
      stats: Gram matrices of the inputs by the path of the matrix ("attn/q").
      method: how the matrices are quantized.

    Returns:
      The quantized layer, and JSON data about each matrix by its path: `shape`, `error` (relative error of the outputs
      on the calibration inputs), `weight_error` (relative error of the weights), and `fallback` (what was used instead,
      if the method could not be used as asked).
    """
    notes: dict[str, Any] = {}

    def change(m: Matrix) -> Weight:
        node, found = _quantized(replicated(m.weight), stats.get(m.module), method)
        error = round(float(_weight_error(m.weight, node)), 6)
        notes[m.module] = {"shape": list(m.weight.shape), **found, "weight_error": error}
        return quantize.with_activations(node, -2, method.activations)

    return weights.map_layer(layer, change), notes


def _quantized(w: jax.Array, statistics: Any, method: Quantization) -> tuple[Node, dict[str, Any]]:
    """Quantize one matrix, and return it with its output error and the fallback, if there are any."""
    grid, group = GRIDS[method.scheme], method.inputs
    if statistics is None:
        return grids.rounded(w, None, grid=grid, group=group, clip=method.clip), {"fallback": NO_INPUTS}
    gram_II = replicated(statistics.products[0])
    node, attempts = gptq.quantize(
        w, gram_II, method.damping, grid=grid, group=group, clip=method.clip,
        act_order=method.act_order, static_groups=method.static_groups,
    )  # fmt: skip
    found: dict[str, Any] = {"error": rounded_error(gram_II, w, weights.dense(node))}
    if int(attempts):
        found["fallback"] = gptq.fallback(int(attempts), method.damping)
    return node, found


_weight_error = jax.jit(quantize.relative_error)
