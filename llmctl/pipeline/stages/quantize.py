"""Define the stage `quantize`, which replaces matrices by integers with scales.

Matrix products are then computed with these integers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from llmctl.artifacts.workspace import Context
from llmctl.compress.schemes import SCHEMES
from llmctl.pipeline.stage import StageConfig, required

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.pipeline.stage import Programs

SHORT = {"int8": 8, "int4": 4}
"""Formats that the setting `bits` selects, and the number of bits that selects each."""


def _scheme(name: str) -> str:
    return name and SCHEMES.check(name)


class Config(StageConfig):
    """Quantize the matrices, by default to int8, without data."""

    common: ClassVar[tuple[str, ...] | None] = ("bits", "format", "group", "embeddings", "head", "activations")
    added: ClassVar[frozenset[str]] = frozenset({"format"})

    kind: Literal["quantize"] = "quantize"
    bits: int = 8
    """Bits per weight: 8 or 4, for the formats int8 and int4."""
    format: Annotated[str, AfterValidator(_scheme), SCHEMES] = ""
    """Format of the weights. int8, int4: integers. nf4: 4-bit quantiles of the normal distribution, for unmerged LoRA
    (QLoRA). Installed packages may add formats. If empty, `bits` selects the format."""
    group: int = Field(default=0, ge=0)
    """Number of inputs per scale. It must divide the number of inputs of every matrix. 0 means one scale per output,
    and 64 inputs for nf4."""
    embeddings: bool = False
    """Also quantize the token embeddings, with one scale per token. Tied embeddings are the output projection too."""
    head: bool = False
    """Also quantize the output projection and the task head."""
    activations: Literal["", "int8"] = ""
    """Also quantize the inputs of quantized matrices, with one scale per token (W8A8)."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """Replace `format` by `bits` if `bits` can select this format.

        A finished stage is therefore not repeated if only the form changes.
        """
        if not isinstance(given, dict) or (bits := SHORT.get(str(given.get("format", "")))) is None:
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

    @property
    def scheme_name(self) -> str:
        """Return the name of the quantization scheme."""
        return self.format or f"int{self.bits}"


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Quantize the parent and write the artifact to `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.compress.lowrank import merged
    from llmctl.compress.quantize import quantize
    from llmctl.distributed import mesh
    from llmctl.pipeline import console

    base = artifact.load(required(config, parent), mesh.make(config.mesh), bases=config.bases)

    def say(text: str) -> None:
        console.say(f"{config.title}: {text}")

    params, errors = quantize(
        merged(base, say, requantizes=True),
        **_quantize_arguments(config),
    )
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
        },
        tokenizer_dir=base.tokenizer_dir,
    )


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
    """Return (the program that quantizes the largest weight, the quantized artifact)."""
    from llmctl.artifacts import abstract_artifact
    from llmctl.compress import programs

    base = required(config, base)
    params = programs.merged(base.model, base.params, mesh)
    held = [] if params is base.params else [base.params]
    found, small = programs.quantization(base.model, params, mesh, held, **_quantize_arguments(config))
    return [found], abstract_artifact.abstract_result(config, small, base.model, base=base)


def _quantize_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of `llmctl.compress.quantize.quantize` that the config sets, by name."""
    given = {name: getattr(config, name) for name in ("group", "embeddings", "head", "activations")}
    return {"scheme": config.scheme_name, **given}
