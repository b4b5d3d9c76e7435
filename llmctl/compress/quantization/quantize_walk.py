"""Quantize an artifact with calibration data, layer by layer as the data passes through.

The inputs of a layer come from the quantized layers before it. A token embedding table has no calibration inputs, so it
is rounded to the nearest levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration import calibration_data
from llmctl.compress.calibration.calibrate import HEAD, LayerReport, Visit, walk
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.output_error import replicated, rounded_error
from llmctl.compress.calibration.settings import CalibrationConfig
from llmctl.compress.calibration.statistics import Collect, Gram, Joined, Peaks, Statistic
from llmctl.compress.quantization import folding, gptq, grids, input_scales, learned, quantize, static_inputs
from llmctl.compress.quantization.autoround import Tuner
from llmctl.compress.quantization.formats import Format
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.static_inputs import Magnitudes
from llmctl.distributed import host_arrays
from llmctl.model import weights
from llmctl.model.config import ModelConfig
from llmctl.model.weights import LearnedScale, Matrix, Node, Weight

Params = dict[str, Any]
NOT_TUNED = "rounding to nearest: autoround tunes layers, not the output head"
"""Message for reports: AutoRound was requested, but a matrix of the output head was rounded to nearest."""
NO_INPUTS = "rounding to nearest: no calibration inputs"
"""Message for reports: a matrix was rounded without data, because calibration collects no inputs of the matrix."""

NO_SCALE = "one scale per token: no calibration inputs"
"""Message for reports: a static scale was requested, but calibration collects no inputs of the matrix."""


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
    """Return the quantized parameters, the report of each layer, and the relative error of each token embedding table.

    Finished layers are saved, so that an interrupted run can resume.

    Args:
      config: calibration settings.
      base: artifact that is compressed.
      params: parameters of the model, with merged adapters. The parameters of the layers are donated.
      method: how the model is quantized.
      mesh: the devices.
      saved: folder of finished layers.
      progress: function that is called with the report of each layer.

    Raises:
      RequestError: If a weight cannot be quantized, or the calibration data cannot be read.
    """
    chosen = quantize.chosen(weights.flatten(params), method)
    batches = calibration_data.load(config, base, mesh)

    tuners: dict[str, Tuner] = {}

    def change(visit: Visit) -> Params:
        if method.tunes and visit.stack != HEAD and visit.stack not in tuners:
            tuners[visit.stack] = tuner(base.model, visit.layer, visit.stack, method, config.dtype)
        layer, visit.notes["matrices"] = quantize_layer(base.model, visit, method, tuners.get(visit.stack))
        return layer

    params, reports = walk(
        base.model, params, batches, collector(method), change,
        head=method.head, progress=progress, saved=saved, dtype=config.dtype,
    )  # fmt: skip
    flat, errors = weights.flatten(params), {}
    for m in weights.matrices(params, "embedding"):
        if m.path in chosen:
            flat[m.path], error = quantize.measured(m.weight, chosen[m.path], method.clips)
            errors[m.path] = float(error)
    return weights.unflatten(flat), reports, errors


def collector(method: Quantization) -> Collect:
    """Return the `Collect` function of a quantization method.

    For each matrix, the function returns a `Joined` statistic with up to three entries. "gram" is the Gram matrix.
    "peaks" has the largest magnitude of each input. "magnitudes" has a histogram of each input's magnitudes. An entry
    is omitted if the method does not read it. Nothing is collected for the token embedding table.
    """

    def collect(path: str, inputs: int) -> Statistic | None:
        parts: dict[str, Any] = {"gram": Gram.start(inputs)} if method.hessian else {}
        if method.smooth or method.static_activations:
            parts["peaks"] = Peaks.start(inputs)
        if method.static_activations == "mse":
            parts["magnitudes"] = Magnitudes.start(inputs)
        return None if path == "embed/tokens" or not parts else Joined(parts)

    return collect


def tuner(cfg: ModelConfig, layer: Params, stack: str, method: Quantization, dtype: Any) -> Tuner:
    """Return the Tuner for the layers of a stack. `layer` is any of these layers, and its arrays may be abstract."""
    modules = [m.module for m in weights.layer_matrices(layer)]
    formats = {module: form for module in modules if (form := method.format_of(full_path(stack, module)))}
    return Tuner(cfg, stack, formats, method.tuning_steps, dtype)


def quantize_layer(
    cfg: ModelConfig, visit: Visit, method: Quantization, tune: Tuner | None = None
) -> tuple[Params, dict[str, Any]]:
    """Quantize the matrices of one layer. Biases do not change. Norms change only if scales are folded into them.

    Args:
      cfg: config of the model.
      visit: the layer and the statistics of its matrices' inputs (see `collector`).
      method: how the matrices are quantized.
      tune: Tuner of the layer's stack, if the method is AutoRound. None for other methods and for the output head.

    Returns:
      The quantized layer, and JSON data about each matrix by its path:

      - `shape`
      - `error`, the relative error of the outputs on the calibration inputs, if there is a Gram matrix
      - `weight_error`, the relative error of the weights, after AWQ or SmoothQuant have scaled the rows
      - `input_scale`, the static scale of the inputs
      - `exponent`, the exponent of AWQ's scales
      - `unscaled`, true if scales were requested and cannot be folded
      - `fallback`, a message, if the requested method or a damping value failed
    """
    notes: dict[str, Any] = {}
    layer, scales, notes_of = _scaled(cfg, visit, method)
    tuned: dict[str, Node] = {}
    if tune and tune.levels:
        tuned, visit.notes["tuning"] = tune.tune(layer, visit)

    def change(m: Matrix) -> Weight:
        if (form := method.format_of(full_path(visit.stack, m.module))) is None:
            return m.weight
        parts = stat.parts if (stat := visit.stats.get(m.module)) else {}
        gram_II = replicated(parts["gram"].products[0]) if "gram" in parts else None
        if gram_II is not None and m.module in scales:
            gram_II = gram_II / scales[m.module][:, None] / scales[m.module][None, :]
        if m.path in tuned:
            node, found = tuned[m.path], {}
        elif isinstance(m.weight, LearnedScale):
            node, found = learned.converted(m.weight, -2), {}
        else:
            node, found = _quantized(replicated(m.weight), gram_II, form, method)
        before = m.weight.weight if isinstance(m.weight, LearnedScale) else m.weight
        error = round(float(_weight_error(before, node)), 6)
        notes[m.module] = {"shape": list(m.weight.shape), **found, "weight_error": error, **notes_of.get(m.module, {})}
        fixed = None
        if method.static_activations:
            fixed, more = _input_scale(parts, scales.get(m.module), method)
            fallbacks = [note["fallback"] for note in (notes[m.module], more) if "fallback" in note]
            notes[m.module] |= more | ({"fallback": "; ".join(fallbacks)} if fallbacks else {})
        return quantize.with_activations(node, -2, method.activations, fixed)

    return weights.map_layer(layer, change), notes


def _scaled(
    cfg: ModelConfig, visit: Visit, method: Quantization
) -> tuple[Params, dict[str, jax.Array], dict[str, dict[str, Any]]]:
    """Scale the inputs of a layer's matrices by AWQ or SmoothQuant. For other methods, return the layer unchanged.

    Returns:
      The scaled layer, which has the same outputs; the scales of each matrix's inputs; JSON data about each matrix.
    """
    layer, scales, notes = visit.layer, {}, {}
    if not (method.scales_inputs or method.smooth):
        return layer, scales, notes
    flat = weights.flatten(visit.layer)
    places = folding.folds(cfg, visit.stack) if visit.stack != HEAD else []
    for at in places:
        formats = {reader: method.format_of(full_path(visit.stack, reader)) for reader in at.readers}
        rounded = [reader for reader, form in formats.items() if form]
        if not rounded:
            continue
        kernels = tuple(replicated(flat[weights.kernel_of(reader)]) for reader in rounded)
        parts, found = visit.stats[at.readers[0]].parts, {}
        if method.smooth:
            scale_I = input_scales.smooth(kernels, replicated(parts["peaks"].peaks), method.alpha, at=at)
        else:
            levels = tuple(grids.levels_of(form) for form in formats.values() if form)
            gram_II = replicated(parts["gram"].products[0])
            scale_I, exponent = input_scales.awq(kernels, gram_II, at=at, levels=levels)
            found = {"exponent": round(float(exponent), 6)}
        layer = folding.fold(cfg, layer, at, scale_I)
        scales |= dict.fromkeys(at.readers, scale_I)
        notes |= dict.fromkeys(at.readers, found)
    modules = [m.module for m in weights.layer_matrices(layer)]
    return layer, scales, {module: notes.get(module, {"unscaled": True}) for module in modules}


def _quantized(
    w: jax.Array, gram_II: jax.Array | None, form: Format, method: Quantization
) -> tuple[Node, dict[str, Any]]:
    """Quantize one matrix.

    Returns:
      The quantized matrix, and JSON data:
      - `error`, the relative error of the outputs, if there is a Gram matrix
      - `fallback`, a message, if the requested method or a damping value failed
    """
    (grid, group), found = grids.levels_of(form), {}
    if method.solves and gram_II is not None:
        node, attempts = gptq.quantize(
            w, gram_II, method.damping, grid=grid, group=group, clip=method.clips,
            act_order=method.act_order, static_groups=method.static_groups,
        )  # fmt: skip
        if int(attempts):
            found["fallback"] = gptq.fallback(int(attempts), method.damping)
    else:
        node = grids.rounded(w, gram_II, grid=grid, group=group, clip=method.clips)
        if method.hessian and gram_II is None:
            found["fallback"] = NO_INPUTS
        if method.tunes:
            found["fallback"] = NOT_TUNED
    if gram_II is not None:
        found["error"] = rounded_error(gram_II, w, weights.dense(node))
    return node, found


def _input_scale(
    parts: dict[str, Any], divisor_I: jax.Array | None, method: Quantization
) -> tuple[jax.Array | None, dict[str, Any]]:
    """Return the static scale of a matrix's inputs, [1, 1], and JSON data with this scale as `input_scale`.

    If calibration collects no inputs of the matrix, the scale is None. The data then has the entry `fallback`, a
    message that each token has its own scale.

    Args:
      parts: statistics of the inputs, by name (see `collector`).
      divisor_I: numbers by which AWQ or SmoothQuant divide the inputs; None if the inputs are not divided.
      method: how the matrix is quantized.
    """
    if "peaks" not in parts:
        return None, {"fallback": NO_SCALE}
    peak_I = host_arrays.read(parts["peaks"].peaks)
    divisors = None if divisor_I is None else host_arrays.read(divisor_I)
    if divisors is not None:
        peak_I = peak_I / divisors
    scale = static_inputs.largest(peak_I, method.activations)
    if method.static_activations == "mse":
        counts_IB = host_arrays.read(parts["magnitudes"].counts)
        scale = static_inputs.least_squares(peak_I, counts_IB, divisors, method.activations)
    return replicated(jnp.full((1, 1), scale, jnp.float32)), {"input_scale": scale}


def full_path(stack: str, module: str) -> str:
    """Return a module's path in the model, given its stack and its path in a layer. For the output head, the stack is
    "head".

    >>> full_path("decoder", "attn/q"), full_path("head", "lm_head")
    ('decoder/blocks/attn/q', 'lm_head')
    """
    return module if stack == HEAD else f"{stack}/blocks/{module}"


_weight_error = jax.jit(quantize.relative_error)
