"""Define the stage `quantize`, which replaces matrices by integers with scales.

Matrix products are then computed with these integers. Some methods choose the integers by calibration data.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmctl.artifacts.workspace import Context
from llmctl.compress.quantization.settings import QuantizeConfig
from llmctl.config.errors import RequestError
from llmctl.pipeline.stage import StageConfig, required

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.compress.quantization.quantize_method import Quantization
    from llmctl.pipeline.stage import Programs


class Config(QuantizeConfig, StageConfig):
    """Quantize the matrices, by default to int8, without data."""

    common: ClassVar[tuple[str, ...] | None] = (
        *("bits", "format", "group", "rules", "embeddings", "head", "activations", "method", "clip", "smooth"),
        "examples",
    )

    kind: Literal["quantize"] = "quantize"

    @property
    def reads_data(self) -> bool:
        """Return whether the stage reads calibration data."""
        return self.quantization.calibrated or bool(self.budget)


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Quantize the parent and write the artifact to `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.compress.lowrank import merged
    from llmctl.compress.quantization import learned, rotation
    from llmctl.compress.quantization.quantize import quantize
    from llmctl.distributed import mesh
    from llmctl.pipeline import console
    from llmctl.train import fake_quantize

    if config.budget and config.plot and importlib.util.find_spec("matplotlib") is None:
        raise RequestError("quantize: the picture needs matplotlib: pip install 'llmctl[demo]', or say plot = false")
    devices = mesh.make(config.mesh)
    base = artifact.load(required(config, parent), devices, bases=config.bases)

    def say(text: str) -> None:
        console.say(f"{config.title}: {text}")

    if config.unread:
        say(f"{', '.join(config.unread)}: not read, because method {config.method!r} rounds without calibration data")
    params, found, model = merged(base, say, requantizes=True), {}, base.model
    learned.check(config, params, base.path)
    method = config.quantization
    if config.rotate:
        rotation.check(model, params, base.manifest.pruned)
        model, tied = rotation.untied(model), model.tied
        params = rotation.rotate(base.model, params, config.seed, devices)
        if model.tied != tied:
            say("the output projection becomes a matrix of its own, with the scale of the final norm")
    if not config.reads_data:
        params, errors = quantize(params, **method.rounding)
    else:
        method, params, errors, found = _with_data(config, rotation.with_model(base, model), params, devices, ctx)
    worst = max(errors, key=lambda path: (errors[path] != errors[path], errors[path]))  # NaN sorts as the largest
    say(f"{_formats(method, [*errors])}; largest relative error {errors[worst]:.2%} ({worst})")
    for line in (*fake_quantize.log_lines(base, config), *left_out(config, params, base.manifest.parameters)):
        say(line)
    ctx.save(
        config,
        params,
        model,
        parent=base.manifest,
        labels=base.manifest.labels,
        metrics={
            "weight_error": {path: round(e, 6) for path, e in errors.items()},
            "weight_error_max": errors[worst],
            "bits_before": base.manifest.bits,
            "bytes_before": base.manifest.bytes,
            "sparsity_before": base.manifest.sparsity,
            **found,
        },
        tokenizer_dir=base.tokenizer_dir,
        beside=_pictures(config, found, ctx),
    )


def _pictures(config: Config, found: dict[str, Any], ctx: Context) -> list[Path]:
    """Plot which format each weight has, and return the plot files.

    The plot shows formats that a budget chose. Without a budget, there is no plot, and the result is []. The result is
    also [] if the setting `plot` is false.
    """
    from llmctl.compress.quantization import front_plot

    if not (config.budget and config.plot):
        return []
    front_plot.plot(found["format_budget"], file := ctx.work / "formats.png")
    return [file]


def _with_data(
    config: Config, base: Artifact, params: dict[str, Any], devices: Mesh, ctx: Context
) -> tuple[Quantization, dict[str, Any], dict[str, float], dict[str, Any]]:
    """Quantize the matrices of a model. If a budget is set, first choose the format of each matrix.

    The log gets one line per loss that is measured to choose formats. If the method calibrates, the log also gets one
    line per quantized layer.

    Returns:
      The quantization with the chosen formats, the quantized parameters, {path of a weight: its largest relative
      error}, and metrics.
    """
    from llmctl.compress.calibration.layer_files import Saved
    from llmctl.compress.calibration.measurements import Measurements
    from llmctl.compress.pruning import prune_report
    from llmctl.compress.quantization import format_report, format_scan, quantize_report
    from llmctl.compress.quantization.quantize import quantize
    from llmctl.compress.quantization.quantize_walk import quantize_layers
    from llmctl.distributed import mesh
    from llmctl.pipeline import console
    from llmctl.train import run_log

    method, found, choice, saved = config.quantization, dict[str, Any](), None, Saved(ctx.work / "layers")
    total = (base.model.layers + base.model.encoder_layers + config.head) * method.calibrated
    with run_log.Reporter(ctx.work, total, config.title, False) as reporter, mesh.use(devices):
        if config.budget:
            choice = format_scan.choose(
                config, base, params, mesh=devices, saved=Measurements(saved.folder), log=reporter, walk_steps=total
            )
            method, found["format_budget"] = choice.method, choice.about
            console.note(format_report.table(choice.about["front"]))
            reporter.say(format_report.line(choice.about))
        if not method.calibrated:
            params, errors = quantize(params, **method.rounding)
            return method, params, errors, found
        params, reports, errors = quantize_layers(
            config, base, params, method, devices, saved=saved, progress=reporter.log_layer
        )
        if choice:
            choice.about["measured_after"] = choice.increase_of(config, base, params)
            reporter.say(format_report.line_after(choice.about, config.method))
        layers = quantize_report.records(reports)
        for line in (*prune_report.fallbacks(layers), *quantize_report.unscaled(layers)):
            reporter.say(line)
    console.note(quantize_report.table(layers))
    found |= {"quantized_layers": layers, "layer_error": prune_report.errors(layers)}
    return method, params, quantize_report.weight_errors(layers) | errors, found


def _formats(method: Quantization, paths: list[str]) -> str:
    """Return the number of weights per format, such as "12 weights to int4, 3 to int8"."""
    from llmctl.model import weights

    counts: dict[str, int] = {}
    for path in paths:
        form = method.format_of(weights.module_path(path))
        name = form.scheme if form else ""
        counts[name] = counts.get(name, 0) + 1
    (name, first), *more = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join([f"{first} weights to {name}", *(f"{n} to {other}" for other, n in more)])


def left_out(config: Config, params: dict[str, Any], parameters: int) -> list[str]:
    """Return one line per kind of matrix that is not quantized because the setting `embeddings` or `head` is false.

    The line has the fraction of all parameters that these matrices contain, and the name of the setting. Matrices that
    a rule leaves unquantized get no line.
    """
    from llmctl.model import weights

    kinds: list[tuple[Literal["embedding", "head"], str, str]] = [
        ("embedding", "embeddings", "the embeddings"),
        ("head", "head", "the output projection and task head"),
    ]
    lines = []
    for place, setting, what in kinds:
        plain = [m.weight for m in weights.matrices(params, place) if weights.is_plain(m.weight)]
        if plain and not getattr(config, setting):
            share, dtype = sum(w.size for w in plain) / parameters, plain[0].dtype
            lines.append(f"{what} ({share:.1%} of the weights) stay {dtype}; {setting} = true quantizes them too")
    return lines


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return two items: the programs of the stage, and the quantized artifact with abstract arrays."""
    from llmctl.artifacts import abstract_artifact
    from llmctl.compress import programs
    from llmctl.compress.quantization import learned, quantization_programs, rotation

    base = required(config, base)
    params = programs.merged(base.model, base.params, mesh)
    learned.check(config, params, base.path)
    held, model, first = [] if params is base.params else [base.params], base.model, []
    if config.rotate:
        rotation.check(model, params, base.manifest.pruned)
        program, params, held = quantization_programs.rotated(model, params, mesh, held)
        model, first = rotation.untied(model), [program]
    method = config.quantization
    if config.budget:
        program, method = quantization_programs.format_search(
            config, model, params, mesh, held, programs.Walk.of(config, base, mesh, labels=True)
        )
        first.append(program)
    walk = programs.Walk.of(config, base, mesh) if method.calibrated else None
    found, small = quantization_programs.quantization(model, params, mesh, held, method, walk)
    return first + found, abstract_artifact.abstract_result(config, small, model, base=base)
