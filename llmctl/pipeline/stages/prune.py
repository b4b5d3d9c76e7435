"""`prune`: heads, neurons and layers that add little go, or single weights become zeros; chosen on calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from llmctl.artifacts.workspace import Context
from llmctl.compress.pattern import Pattern
from llmctl.config.errors import RequestError
from llmctl.config.settings import Dtype
from llmctl.data.config import DataConfig, Split, Truncate
from llmctl.pipeline.stage import StageConfig, required

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.compress.calibrate import LayerReport
    from llmctl.compress.programs import Walk
    from llmctl.model.config import ModelConfig
    from llmctl.pipeline.stage import Programs

    Pruned = tuple[ModelConfig, dict[str, Any], dict[str, Any]]


class Config(StageConfig):
    """Make a model smaller: really (structured), or by zeros that later training keeps (magnitude, wanda)."""

    kind: Literal["prune"] = "prune"
    method: Literal["structured", "magnitude", "wanda"] = "structured"
    """Whole heads, neurons and layers; or single weights, by size or by size times the norm of their inputs."""
    heads: float = Field(default=0.0, ge=0)
    """Structured: query heads a layer; below 1 the fraction removed, from 1 on how many are kept, 0 leaves all."""
    heads_by: Literal["groups", "queries"] = "groups"
    """Structured: remove key/value heads with all their queries, or as many queries from each key/value head."""
    ffn: float = Field(default=0.0, ge=0)
    """Structured: neurons a feed-forward layer; below 1 the fraction removed, from 1 on how many are kept."""
    multiple: int = Field(default=1, ge=1)
    """Structured: the neurons kept are a multiple of this (128 suits TPUs)."""
    layers: float = Field(default=0.0, ge=0)
    """Structured: layers; below 1 the fraction removed, from 1 on how many are kept."""
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Magnitude and wanda: fraction of each matrix (wanda: of each output's inputs) that becomes zero."""
    pattern: str = "unstructured"
    """Magnitude and wanda: unstructured, or N:M to keep N of every M inputs, such as 2:4 (its own sparsity)."""
    data: DataConfig = DataConfig()
    """Calibration texts; labels are not needed. Magnitude needs none."""
    split: Split = "train"
    """Split of the data to calibrate on."""
    examples: int = Field(default=256, ge=1)
    """Texts to calibrate on at most, chosen by their hash."""
    seq_len: int = Field(default=0, ge=0)
    """Tokens a sequence; 0 takes what was trained with."""
    truncate: Literal["", Truncate] = ""
    """What a text too long keeps; empty takes what was trained with."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences a batch."""
    dtype: Dtype = "float32"
    """Compute type of the calibration."""

    @model_validator(mode="after")
    def _belongs(self) -> Config:
        structured = {"heads", "heads_by", "ffn", "multiple", "layers"}
        other = {"sparsity", "pattern"} if self.method == "structured" else structured
        stray = sorted(self.model_fields_set & other)
        if stray:
            raise ValueError(f"{', '.join(stray)}: not for method {self.method!r}")
        if self.method == "structured" and not (self.heads or self.ffn or self.layers):
            raise ValueError("structured pruning needs at least one of heads, ffn and layers")
        try:
            own = Pattern.parse(self.pattern, self.sparsity).sparsity
        except RequestError as e:
            raise ValueError(str(e)) from None
        if "sparsity" in self.model_fields_set and abs(self.sparsity - own) > 1e-9:
            raise ValueError(f"sparsity {self.sparsity} contradicts pattern {self.pattern}, which has {own:g}")
        return self


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Prunes and leaves the artifact in `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.compress.lowrank import merged
    from llmctl.distributed import mesh
    from llmctl.train import run_log

    pattern = Pattern.parse(config.pattern, config.sparsity)
    devices = mesh.make(config.mesh)
    base = artifact.load(required(config, parent), devices)
    walks = (bool(config.layers) + bool(config.heads or config.ffn)) if config.method == "structured" else 1
    total = walks * (base.model.layers + base.model.encoder_layers)
    with run_log.Reporter(ctx.work, total, config.title, False) as reporter, mesh.use(devices):
        done = 0

        def progress(report: LayerReport) -> None:
            nonlocal done
            done += 1
            reporter.log(done, {"layer": report.layer, "influence": report.influence, "error": report.error})

        params = merged(base, reporter.say)
        structured = config.method == "structured"
        work = _structured if structured else _unstructured
        model, params, found = work(config, base, params, devices, pattern, progress)
    ctx.leave(
        config,
        params,
        model,
        parent=base.manifest,
        labels=base.manifest.labels,
        metrics=found | {"parameters_before": base.manifest.parameters, "sparsity_before": base.manifest.sparsity},
        tokenizer_dir=base.tokenizer_dir,
    )


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return the steps of the walk and the change of a matrix, and the smaller or sparser model."""
    from llmctl.artifacts import abstract_artifact
    from llmctl.compress import programs, prune
    from llmctl.model import functional

    base = required(config, base)
    params = programs.merged(base.model, base.params, mesh)
    if config.method != "structured":
        pattern = Pattern.parse(config.pattern, config.sparsity)
        prune.check(params, pattern)
        walk = _walk(config, base, mesh) if prune.METHODS[config.method].calibrated else None
        found = programs.zeros(base.model, params, config.method, pattern, mesh, walk)
        return found, abstract_artifact.left(config, params, base.model, base=base, pruned=True)
    target = _target(config, base, params, mesh)
    small = functional.laid_out(target, functional.abstract(target), mesh)
    found = programs.cuts(base.model, params, target, mesh, _walk(config, base, mesh))
    return found, abstract_artifact.left(config, small, target, base=base)


def _walk(config: Config, base: Artifact, mesh: Mesh) -> Walk:
    """Return the calibration walk over made-up texts of the right shapes."""
    from llmctl.compress import calibration_data
    from llmctl.compress.programs import Walk

    batch, batches = calibration_data.abstract(
        base.model, config.data, mesh,
        examples=config.examples, seq_len=_seq_len(config, base), batch_size=config.batch_size,
    )  # fmt: skip
    return Walk(batch, batches, config.dtype, mesh, base.params)


def _target(config: Config, base: Artifact, params: dict[str, Any], mesh: Mesh) -> ModelConfig:
    """Return the sizes after structured pruning.

    Raises:
      RequestError: the model cannot be cut to them, or the mesh cannot split them.
    """
    from llmctl.compress import shrink
    from llmctl.model import functional

    target = shrink.target(
        base.model, heads=config.heads, ffn=config.ffn, layers=config.layers, by=config.heads_by,
        multiple=config.multiple,
    )  # fmt: skip
    functional.shardings(target, functional.abstract(target), mesh)  # refuses what the mesh cannot split
    shrink.check_cuttable(base.model, params, target)
    return target


def _structured(
    config: Config,
    base: Artifact,
    params: dict[str, Any],
    devices: Any,
    pattern: Pattern,
    progress: Callable[[LayerReport], None],
) -> Pruned:
    """Layers first, then widths on what is left, so that heads and neurons are judged by the inputs they will see."""
    from llmctl.compress import structured

    model, target = base.model, _target(config, base, params, devices)
    batches = _batches(config, base, devices)
    found: dict[str, Any] = {}
    how = {"progress": progress, "dtype": config.dtype}
    if structured.fewer_layers(model, target):
        model, params, found["layers_kept"] = structured.prune_layers(model, params, batches, target, **how)
    if structured.narrower(model, target):
        model, params, reports = structured.prune_widths(model, params, batches, target, **how)
        found["layer_error"] = _errors(reports)
    return model, params, found


def _unstructured(
    config: Config,
    base: Artifact,
    params: dict[str, Any],
    devices: Any,
    pattern: Pattern,
    progress: Callable[[LayerReport], None],
) -> Pruned:
    """Zeros, layer by layer; magnitude looks at no data."""
    from llmctl.compress import prune
    from llmctl.compress.calibrate import Stats, moments, walk

    prune.check(params, pattern)
    before = prune.sparsity(params)
    if not pattern.of and before >= pattern.sparsity:
        raise RequestError(
            f"{base.path}: its matrices are {before:.1%} zeros already; sparsity {pattern.sparsity} changes nothing"
        )

    def change(stack: str, index: int, layer: dict[str, Any], stats: Stats) -> dict[str, Any]:
        return prune.prune_layer(layer, stats, method=config.method, pattern=pattern)

    found: dict[str, Any] = {}
    if prune.METHODS[config.method].calibrated:
        batches = _batches(config, base, devices)
        params, reports = walk(base.model, params, batches, moments, change, progress=progress, dtype=config.dtype)
        found["layer_error"] = _errors(reports)
    else:
        params = prune.prune_uncalibrated(params, method=config.method, pattern=pattern)
    return base.model, params, found | {"block_sparsity": prune.sparsity(params)}


def _errors(reports: list[LayerReport]) -> dict[str, list[float]]:
    """Relative output error of the layers of each stack, on the inputs that pruning left them."""
    return {s: [round(r.error, 6) for r in reports if r.stack == s] for s in dict.fromkeys(r.stack for r in reports)}


def _seq_len(config: Config, base: Artifact) -> int:
    """Return the length of the calibration texts, in tokens.

    Raises:
      RequestError: it is unknown, or too long for the model.
    """
    seq_len = config.seq_len or base.manifest.seq_len
    if not seq_len:
        raise RequestError(f"{base.path}: does not say how long its training texts were; say it with seq_len")
    if seq_len > base.model.max_seq_len:
        raise RequestError(
            f"{base.path}: seq_len {seq_len} is longer than its longest sequence ({base.model.max_seq_len})"
        )
    return seq_len


def _batches(config: Config, base: Artifact, devices: Any) -> list[dict[str, Any]]:
    from llmctl.compress.calibration_data import calibration_batches
    from llmctl.data.tokenizers import loading

    return calibration_batches(
        base.model,
        config.data,
        loading.load(base.tokenizer_dir),
        devices,
        split=config.split,
        examples=config.examples,
        seq_len=_seq_len(config, base),
        batch_size=config.batch_size,
        truncate=config.truncate or base.manifest.truncate or "tail",
    )
