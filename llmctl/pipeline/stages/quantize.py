"""`quantize`: weights as integers with scales, round to nearest; stored and computed as such."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from llmctl.artifacts.workspace import Context
from llmctl.pipeline.stage import StageConfig, required

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.pipeline.stage import Programs


class Config(StageConfig):
    """Store the matrices as int8 or int4; needs no data."""

    kind: Literal["quantize"] = "quantize"
    bits: int = 8
    """Bits of a weight: 8 or 4."""
    group: int = Field(default=0, ge=0)
    """Inputs that share a scale; 0 is one scale for each output channel. Must divide the inputs of every matrix."""
    embeddings: bool = False
    """Quantize the token embeddings too, one scale a row; tied ones are also the output projection."""
    head: bool = False
    """Quantize the output projection and task head too."""
    activations: Literal["", "int8"] = ""
    """Also quantize what is multiplied with the integers, one scale a token, as it goes by (W8A8)."""

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: int) -> int:
        if bits not in (8, 4):
            raise ValueError(f"must be 8 or 4, got {bits}")
        return bits


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Quantizes and leaves the artifact in `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.compress.lowrank import merged
    from llmctl.compress.quantize import quantize
    from llmctl.distributed import mesh
    from llmctl.pipeline import console

    base = artifact.load(required(config, parent), mesh.make(config.mesh))

    def say(text: str) -> None:
        console.say(f"{config.title}: {text}")

    params, errors = quantize(
        merged(base, say, requantizes=True),
        **_how(config),
    )
    worst = max(errors, key=lambda path: errors[path])
    say(f"{len(errors)} weights to int{config.bits}; largest relative error {errors[worst]:.2%} ({worst})")
    ctx.leave(
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


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return the rounding of the largest weight, and the model with integers."""
    from llmctl.artifacts import abstract_artifact
    from llmctl.compress import programs

    base = required(config, base)
    params = programs.merged(base.model, base.params, mesh)
    held = [] if params is base.params else [base.params]
    found, small = programs.roundings(base.model, params, mesh, held, **_how(config))
    return [found], abstract_artifact.left(config, small, base.model, base=base)


def _how(config: Config) -> dict[str, Any]:
    """Return the arguments of `llmctl.compress.quantize.quantize`."""
    return {name: getattr(config, name) for name in ("bits", "group", "embeddings", "head", "activations")}
