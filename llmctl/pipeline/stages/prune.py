"""Define the stage `prune`, which removes heads, neurons, hidden channels and layers, or sets single weights to zero.

Most pruning methods select weights by measurements on calibration data.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from llmctl.artifacts.workspace import Context
from llmctl.compress.pruning.settings import STRUCTURED, SparseSettings
from llmctl.compress.pruning.sparse_method import SPARSEGPT
from llmctl.compress.structured_pruning.settings import StructuredSettings
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.config.errors import RequestError
from llmctl.pipeline.stage import StageConfig, required

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.compress.structured_pruning.latency import Shapes
    from llmctl.model.config import ModelConfig
    from llmctl.pipeline.stage import Programs
    from llmctl.train.run_log import Reporter

    Pruned = tuple[ModelConfig, dict[str, Any], dict[str, Any], Path | None]
    """Config and parameters of the pruned model, metrics, and folder of the tokenizer."""


class Config(StructuredSettings, SparseSettings, StageConfig):
    """Prune a model: remove heads, neurons and layers, or set weights to zero (magnitude, wanda, sparsegpt, …)."""

    added: ClassVar[frozenset[str]] = StructuredSettings.added | SparseSettings.added
    common: ClassVar[tuple[str, ...] | None] = (
        *("method", "keep_layers", "remove_layers", "keep_heads", "remove_heads", "keep_ffn", "remove_ffn"),
        *("sparsity", "pattern", "repair", "examples"),
    )

    kind: Literal["prune"] = "prune"

    @model_validator(mode="after")
    def _belongs(self) -> Config:
        structured = {"heads", "heads_by", "ffn", "multiple", "layers", "hidden", "budget", "importance"}
        structured |= {"vocabulary", "latency", "plot"}
        zeros = {"sparsity", "pattern", "damping", "allocation", "spread", "outlier", "store"}
        other = zeros if self.method == STRUCTURED else structured
        if self.method != SPARSEGPT:
            other = other | {"damping"}
        stray = sorted(self.model_fields_set & other)
        if stray:
            instead = "another one, such as 'magnitude'" if self.method == STRUCTURED else repr(STRUCTURED)
            instead = repr(SPARSEGPT) if stray == ["damping"] else instead
            raise ValueError(f"{', '.join(stray)}: not for method {self.method!r}; set method to {instead}")
        if self.method == STRUCTURED:
            self.check_structure()
        self.check_zeros()
        return self

    @property
    def reads_data(self) -> bool:
        """Return whether the stage reads calibration data."""
        return self.method == STRUCTURED or self.zeros.calibrated

    @property
    def structure(self) -> StructuredMethod:
        """Return the configured method of structured pruning, which removes heads, neurons and hidden channels."""
        return StructuredMethod(self.importance, self.repair, self.seed)


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Prune the parent and write the artifact to `ctx.out`."""
    import jax

    from llmctl.artifacts import artifact
    from llmctl.compress.lowrank import merged
    from llmctl.distributed import mesh
    from llmctl.pipeline import console
    from llmctl.train import run_log

    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise RequestError("prune: the picture needs matplotlib: pip install 'llmctl[demo]', or say plot = false")
    devices = mesh.make(config.mesh)
    base = artifact.load(required(config, parent), devices, bases=config.bases)
    params = merged(base, lambda line: console.say(f"{config.title}: {line}"))
    structured, shapes = config.method == STRUCTURED, jax.eval_shape(lambda tree: tree, params)
    with run_log.Reporter(ctx.work, 0, config.title, False) as reporter, mesh.use(devices):
        prune = _prune_structure if structured else _prune_weights
        model, params, found, tokenizer = prune(config, base, params, devices, ctx, reporter)
    pictures = _report(config, base, (base.model, shapes), (model, params), found, ctx) if structured else ()
    ctx.save(
        config,
        params,
        model,
        parent=base.manifest,
        labels=base.manifest.labels,
        pruned=None if structured else True,
        sparse=True if config.store == "sparse" else None,
        metrics=found | {"parameters_before": base.manifest.parameters, "sparsity_before": base.manifest.sparsity},
        tokenizer_dir=tokenizer,
        beside=pictures,
    )


def _prune_structure(
    config: Config, base: Artifact, params: dict[str, Any], mesh: Mesh, ctx: Context, log: Reporter
) -> Pruned:
    """Remove layers, hidden channels, heads and neurons. If a budget is set, first choose the sizes that meet the
    budget."""
    from llmctl.compress.calibration.layer_files import Saved
    from llmctl.compress.calibration.measurements import Measurements
    from llmctl.compress.structured_pruning import sizes, structured_walk, vocabulary
    from llmctl.convert import architectures
    from llmctl.pipeline import console

    scan, chosen, method, saved = None, dict[str, Any](), config.structure, Saved(ctx.work / "layers")
    kept, rows = None, base.model.vocab_size
    if config.vocabulary:
        known = vocabulary.rows_after(config, base.model)
        sizes.target(config, base, params, method, mesh, known)  # raises for impossible sizes before the data is read
        kept = vocabulary.choose(config, base, ctx.work, Measurements(saved.folder), log.say)
        chosen["vocabulary"], rows = kept.about, len(kept.ids)
    if asked := config.budget.asked:
        scan, target, chosen["budget"] = structured_walk.choose_sizes(
            config, base, params, asked, method, mesh, rows=rows, saved=saved, log=log, show=console.note
        )
    else:
        target = sizes.target(config, base, params, method, mesh, rows)
        log.total = structured_walk.pruning_steps(base.model, target, method)
    for line in filter(None, (sizes.describe(config, base.model, target), architectures.notice(target, base.model))):
        log.say(line)
    model, params, found = structured_walk.prune_structure(
        config, base, params, target, method, mesh, saved=saved, log=log, scan=scan
    )
    if kept:
        model, params = vocabulary.cut(model, params, kept.ids)
    return model, params, found | chosen, kept.folder if kept else base.tokenizer_dir


def _report(
    config: Config, base: Artifact, before: Shapes, after: Shapes, found: dict[str, Any], ctx: Context
) -> list[Path]:
    """Compare the unpruned and the pruned model in a table of layers and a table of sizes.

    The tables are printed and added to the metrics `found`. `before` and `after` are the config and the parameters of
    the unpruned and of the pruned model.

    Returns:
      The plot files.
    """
    from llmctl.compress.structured_pruning import importance_plot, latency, sizes, structured_report
    from llmctl.pipeline import console

    models = {"before": before, "after": after}
    seq_len = config.seq_len or base.manifest.seq_len or min(base.model.max_seq_len, 2048)
    times = latency.measure(models, latency.phases(before[0], seq_len), config.dtype) if config.latency else {}
    if timed := found.get("budget", {}).get("latency"):
        again = latency.measure(models, [sizes.timing(config, base)], config.dtype)
        timed |= structured_report.latencies(timed, again, config.budget.latency)
        console.say(f"{config.title}: {structured_report.latency_line(timed)}")
    found["structured_layers"] = structured_report.layers(before[0], after[0], found)
    found["sizes"] = {n: structured_report.sizes(*shapes, seq_len, times.get(n)) for n, shapes in models.items()}
    console.note(structured_report.layers_table(found["structured_layers"], before[0]))
    console.note(structured_report.sizes_table(**found["sizes"]))
    file = ctx.work / "importance.png"
    return [file] if config.plot and importance_plot.plot(found, file) else []


def _prune_weights(
    config: Config, base: Artifact, params: dict[str, Any], mesh: Mesh, ctx: Context, log: Reporter
) -> Pruned:
    """Set single elements of matrices to zero. The shapes of the matrices do not change."""
    from llmctl.compress.calibration.layer_files import Saved
    from llmctl.compress.pruning import prune, prune_report, sparse_walk
    from llmctl.pipeline import console

    log.total = (1 + (config.allocation != "uniform")) * (base.model.layers + base.model.encoder_layers)
    saved = Saved(ctx.work / "layers")
    params, layers = sparse_walk.prune_weights(
        config, base, params, config.zeros, mesh, seed=config.seed, saved=saved, progress=log.log_layer
    )
    found: dict[str, Any] = {"block_sparsity": prune.sparsity(params), "pruned_layers": layers}
    if errors := prune_report.errors(layers):
        found["layer_error"] = errors
    for line in prune_report.fallbacks(layers):
        log.say(line)
    console.note(prune_report.table(layers))
    return base.model, params, found, base.tokenizer_dir


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return the programs that the stage compiles, and the pruned artifact as shapes without values. Nothing is run.

    If the method reads data, some programs calibrate the layers. If single weights are set to zero, one program prunes
    the largest matrix, and represents the pruning of all matrices.
    """
    from llmctl.artifacts import abstract_artifact
    from llmctl.compress import programs
    from llmctl.compress.pruning import prune, pruning_programs
    from llmctl.compress.structured_pruning import sizes, structured_programs, vocabulary
    from llmctl.model import functional

    base = required(config, base)
    params = programs.merged(base.model, base.params, mesh)
    if config.method != STRUCTURED:
        method = config.zeros
        prune.check(params, method)
        walk = programs.Walk.of(config, base, mesh, bool(method.gradients)) if method.calibrated else None
        found = pruning_programs.pruning(base.model, params, method, mesh, walk)
        zeros = method.pattern.sparsity if config.store == "sparse" else None
        left = abstract_artifact.abstract_result(config, params, base.model, base=base, pruned=True, sparsity=zeros)
        return found, left
    method, asked = config.structure, config.budget.asked
    rows = vocabulary.rows_after(config, base.model)
    target = sizes.target(config, base, params, method, mesh, rows)
    small = functional.laid_out(target, functional.abstract(target), mesh)
    walk = programs.Walk.of(config, base, mesh, method.gradients or bool(asked))
    found = []
    if asked:
        space, _, _ = sizes.search(config, base, params, asked, method, mesh, rows)
        found += structured_programs.search(base.model, params, space, method, walk)
        if asked[0] == "latency":
            timing = sizes.timing(config, base)
            found += structured_programs.timed(base.model, params, timing, mesh, config.dtype)
    found += structured_programs.structured_pruning(base.model, params, target, method, mesh, walk, known=bool(asked))
    return found, abstract_artifact.abstract_result(config, small, target, base=base)
