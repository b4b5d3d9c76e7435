"""Define the stage `quantize`, which replaces matrices by integers with scales.

Matrix products are then computed with these integers. Some methods choose the integers by calibration data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from llmctl.artifacts.workspace import Context
from llmctl.compress.calibration.settings import DAMPING, CalibrationConfig
from llmctl.compress.quantization.quantize_method import MethodName, Quantization
from llmctl.compress.quantization.schemes import BLOCKS, SCHEMES, has_grid
from llmctl.pipeline.stage import StageConfig, required

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.pipeline.stage import Programs

SHORT = {"int8": 8, "int4": 4}
"""Value of the setting `bits` that selects each of these formats."""
CALIBRATION = frozenset(CalibrationConfig.model_fields)
"""Settings that only methods with calibration data read."""
RTN = "rtn"
"""Name of the method without calibration data."""


def _scheme(name: str) -> str:
    return name and SCHEMES.check(name)


class Config(CalibrationConfig, StageConfig):
    """Quantize the matrices, by default to int8, without data."""

    common: ClassVar[tuple[str, ...] | None] = (
        *("bits", "format", "group", "embeddings", "head", "activations", "method", "clip", "smooth", "examples"),
    )
    added: ClassVar[frozenset[str]] = CALIBRATION | {
        *("format", "method", "damping", "act_order", "static_groups", "clip", "smooth", "alpha"),
    }

    kind: Literal["quantize"] = "quantize"
    bits: int = 8
    """Bits per weight: 8 or 4, for the formats int8 and int4."""
    format: Annotated[str, AfterValidator(_scheme), SCHEMES] = ""
    """Format of the weights. int8, int4, int3, int2: integers. fp8_e4m3, fp8_e5m2: 8-bit floats. mxfp4, nvfp4: 4-bit
    floats with 8-bit scales for blocks of 32 and of 16 inputs. nf4: 4-bit quantiles of the normal distribution, for
    unmerged LoRA (QLoRA). Installed packages may add formats. If empty, `bits` selects the format."""
    group: int = Field(default=0, ge=0)
    """Number of inputs per scale. It must divide the number of inputs of every matrix. 0 means one scale per output,
    64 inputs for nf4, 32 for mxfp4 and 16 for nvfp4."""
    embeddings: bool = False
    """Also quantize the token embeddings, with one scale per token. Tied embeddings are the output projection too."""
    head: bool = False
    """Also quantize the output projection and the task head."""
    activations: Literal["", "int8"] = ""
    """Also quantize the inputs of quantized matrices, with one scale per token (W8A8)."""
    method: MethodName = RTN
    """Method that chooses the rounded weights. rtn: round to nearest, without data. gptq: round one input after the
    other, and let later weights compensate for the errors, by the Hessian of calibration data. awq: scale the inputs of
    matrices by their magnitude in calibration data, clip, and round to nearest. awq+gptq: the scales of awq, then gptq.
    Token embeddings are always rounded to nearest."""
    clip: bool = False
    """Search for scales with the least squared error, which may clip the largest weights. Method rtn measures the error
    of the weights, the others that of the outputs. Method awq always searches."""
    smooth: bool = False
    """Divide activations by one scale per channel, and multiply the weights that read them by the same scale
    (SmoothQuant). Outliers of activations then have less effect. Requires calibration data and activations = "int8"."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Migration strength of `smooth`: 0 scales by the weights alone, 1 by the activations alone."""
    damping: float = Field(default=DAMPING, gt=0, le=1)
    """Method gptq: fraction of the Hessian's mean diagonal entry to add to its diagonal. If a Hessian has no inverse,
    the fraction is multiplied by 10, and the matrix is reported."""
    act_order: bool = True
    """Method gptq: round inputs with larger sums of squares first."""
    static_groups: bool = True
    """Method gptq with groups: use scales of the unchanged weights. If false, a group's scale is determined when its
    first input is rounded; this requires act_order = false."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """Normalize the settings: replace `format` by `bits` if `bits` can select the format, and drop unused data
        settings.

        Equal results then have equal settings, so that a finished stage is not repeated. Data settings are unused if
        the method reads no calibration data.
        """
        if not isinstance(given, dict):
            return given
        if given.get("method", RTN) == RTN and not given.get("smooth"):
            given = {key: value for key, value in given.items() if key not in CALIBRATION}
        if (bits := SHORT.get(str(given.get("format", "")))) is None:
            return given
        if given.get("bits", bits) != bits:
            raise ValueError(f"bits {given['bits']} contradicts format {given['format']}")
        return {key: value for key, value in given.items() if key != "format"} | {"bits": bits}

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: int) -> int:
        if bits not in (8, 4):
            raise ValueError(f"must be 8 or 4, got {bits}")
        return bits

    @model_validator(mode="after")
    def _one_form(self) -> Config:
        if self.format and "bits" in self.model_fields_set:
            raise ValueError(f"bits {self.bits} has no meaning for format {self.format}")
        return self

    @model_validator(mode="after")
    def _belongs(self) -> Config:
        told = self.model_fields_set
        method = self.quantization
        stray = sorted(told & {"damping", "act_order", "static_groups"})
        if stray and not method.solves:
            raise ValueError(f"{', '.join(stray)}: not for method {self.method!r}; set method to 'gptq'")
        name, block = self.scheme_name, BLOCKS.get(self.scheme_name)
        if block and self.group not in (0, block):
            raise ValueError(f"group {self.group}: {name} has one scale for every {block} inputs; leave it out")
        if self.activations and has_grid(name) and name not in SHORT:
            raise ValueError(f"activations: not for format {name!r}; choose {' or '.join(SHORT)}")
        if "alpha" in told and not self.smooth:
            raise ValueError("alpha: only with smooth = true")
        if self.smooth and not self.activations:
            raise ValueError("smooth: only with quantized activations; set activations = 'int8'")
        if self.smooth and method.scales_inputs:
            raise ValueError(f"smooth: not with method {self.method!r}, which scales the same inputs")
        if (method.calibrated or self.clip) and not has_grid(self.scheme_name):
            what = f"method {self.method!r}" if self.method != RTN else "smooth" if self.smooth else "clip"
            raise ValueError(f"{what}: not for format {self.scheme_name!r}, whose levels are not known; choose another")
        if "static_groups" in told and not method.inputs:
            raise ValueError("static_groups: only with groups; set group, such as 128")
        if not self.static_groups and (self.act_order or method.clips):
            other = "act_order = true" if self.act_order else "clip = true" if self.clip else f"method {self.method!r}"
            raise ValueError(f"static_groups = false: not with {other}")
        return self

    @property
    def reads_data(self) -> bool:
        """Return whether the stage reads calibration data."""
        return self.quantization.calibrated

    @property
    def scheme_name(self) -> str:
        """Return the name of the quantization scheme."""
        return self.format or f"int{self.bits}"

    @property
    def quantization(self) -> Quantization:
        """Return the description of the quantization that `llmctl.compress` reads."""
        names = ("group", "embeddings", "head", "activations", "method", "clip", "smooth", "alpha", "damping")
        given = {name: getattr(self, name) for name in (*names, "act_order", "static_groups")}
        return Quantization(self.scheme_name, **given)


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Quantize the parent and write the artifact to `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.compress.lowrank import merged
    from llmctl.compress.quantization.quantize import quantize
    from llmctl.distributed import mesh
    from llmctl.pipeline import console

    devices = mesh.make(config.mesh)
    base = artifact.load(required(config, parent), devices, bases=config.bases)

    def say(text: str) -> None:
        console.say(f"{config.title}: {text}")

    params, found = merged(base, say, requantizes=True), {}
    if not config.quantization.calibrated:
        params, errors = quantize(params, **config.quantization.rounding)
    else:
        params, errors, found = _calibrated(config, base, params, devices, ctx)
    worst = max(errors, key=lambda path: (errors[path] != errors[path], errors[path]))  # NaN sorts as the largest
    say(f"{len(errors)} weights to {config.scheme_name}; largest relative error {errors[worst]:.2%} ({worst})")
    for line in left_out(params, base.manifest.parameters):
        say(line)
    ctx.save(
        config,
        params,
        base.model,
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
    )


def _calibrated(
    config: Config, base: Artifact, params: dict[str, Any], devices: Mesh, ctx: Context
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Quantize a model with calibration data, and log one line per layer.

    Returns:
      The parameters, the largest relative error of each weight by path, and the metrics of the layers.
    """
    from llmctl.compress.calibration.layer_files import Saved
    from llmctl.compress.pruning import prune_report
    from llmctl.compress.quantization import quantize_report
    from llmctl.compress.quantization.quantize_walk import quantize_layers
    from llmctl.distributed import mesh
    from llmctl.pipeline import console
    from llmctl.train import run_log

    total = base.model.layers + base.model.encoder_layers + config.head
    with run_log.Reporter(ctx.work, total, config.title, False) as reporter, mesh.use(devices):
        params, reports, errors = quantize_layers(
            config,
            base,
            params,
            config.quantization,
            devices,
            saved=Saved(ctx.work / "layers"),
            progress=reporter.log_layer,
        )
        layers = quantize_report.records(reports)
        for line in (*prune_report.fallbacks(layers), *quantize_report.unscaled(layers)):
            reporter.say(line)
    console.note(quantize_report.table(layers))
    found = {"quantized_layers": layers, "layer_error": prune_report.errors(layers)}
    return params, quantize_report.weight_errors(layers) | errors, found


def left_out(params: dict[str, Any], parameters: int) -> list[str]:
    """Return one line per kind of matrix that stays unquantized.

    The line has the fraction of the weights that are in these matrices, and the setting that quantizes them too.
    """
    from llmctl.model import weights

    kinds: list[tuple[Literal["embedding", "head"], str, str]] = [
        ("embedding", "embeddings", "the embeddings"),
        ("head", "head", "the output projection and task head"),
    ]
    lines = []
    for place, setting, what in kinds:
        plain = [m.weight for m in weights.matrices(params, place) if weights.is_plain(m.weight)]
        if plain:
            share, dtype = sum(w.size for w in plain) / parameters, plain[0].dtype
            lines.append(f"{what} ({share:.1%} of the weights) stay {dtype}; {setting} = true quantizes them too")
    return lines


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return (the programs that calibrate the layers and quantize the largest weight, the quantized artifact)."""
    from llmctl.artifacts import abstract_artifact
    from llmctl.compress import programs
    from llmctl.compress.quantization import quantization_programs

    base = required(config, base)
    params = programs.merged(base.model, base.params, mesh)
    walk = programs.Walk.of(config, base, mesh) if config.quantization.calibrated else None
    held = [] if params is base.params else [base.params]
    found, small = quantization_programs.quantization(base.model, params, mesh, held, config.quantization, walk)
    return found, abstract_artifact.abstract_result(config, small, base.model, base=base)
