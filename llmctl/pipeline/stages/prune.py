"""Define the stage `prune`, which removes heads, neurons, hidden channels and layers, or sets single weights to zero.

Most pruning methods choose what to prune by measurements on calibration data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmctl.artifacts.workspace import Context
from llmctl.compress.calibration.settings import DAMPING, CalibrationConfig
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.scores import SCORES
from llmctl.compress.pruning.sparse_method import SPARSEGPT, Allocation, AllocationName, SparseMethod, comparable
from llmctl.compress.structured_pruning.budget import BudgetConfig
from llmctl.compress.structured_pruning.structured_method import ImportanceName, StructuredMethod
from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.config.registry import Choices
from llmctl.pipeline.stage import StageConfig, required

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.model.config import ModelConfig
    from llmctl.pipeline.stage import Programs


STRUCTURED = "structured"
"""Name of the method that removes heads, neurons, hidden channels and layers. Every other method sets single weights to
zero."""
PARTS = ("heads", "ffn", "layers", "hidden")
"""Fields that set how much structured pruning removes. Each field X has the longer forms keep_X and remove_X."""


def _method(name: str) -> str:
    known = _methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}{hint(name, known)}; known: {', '.join(known)}")
    return name


def _methods() -> list[str]:
    return [STRUCTURED, SPARSEGPT, *SCORES]


class Config(CalibrationConfig, StageConfig):
    """Prune a model: remove heads, neurons and layers, or set weights to zero (magnitude, wanda, sparsegpt, …)."""

    added: ClassVar[frozenset[str]] = frozenset(
        {f"{verb}_{part}" for part in PARTS for verb in ("keep", "remove")}
        | {"damping", "repair", "allocation", "spread", "outlier", "store", "importance", "hidden", "budget"}
    )
    common: ClassVar[tuple[str, ...] | None] = (
        *("method", "keep_layers", "remove_layers", "keep_heads", "remove_heads", "keep_ffn", "remove_ffn"),
        *("sparsity", "pattern", "repair", "examples"),
    )

    kind: Literal["prune"] = "prune"
    method: Annotated[str, AfterValidator(_method), Choices(_methods)] = STRUCTURED
    """Method. structured: remove heads, neurons, hidden channels and layers. All other methods set single weights to
    zero. sparsegpt: choose zeros by the Hessian, and let the kept weights compensate for them. All others prune the
    lowest scores; without repair, kept weights do not change. magnitude: absolute value. wanda: absolute value times
    the norm of the inputs. ria: share of the weights of its input and output, times the root of that norm. taylor,
    fisher: scores from the loss's gradient. random: random scores."""
    heads: float = Field(default=0.0, ge=0)
    """Short form of keep_heads (a number from 1) and of remove_heads (a number below 1); 0 keeps all heads."""
    keep_heads: int = Field(default=0, ge=0, strict=True)
    """Method structured: number of query heads to keep per layer."""
    remove_heads: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Method structured: fraction of the query heads to remove per layer."""
    heads_by: Literal["groups", "queries"] = "groups"
    """Method structured. groups: remove key/value heads with all their query heads. queries: remove the same number of
    query heads from every key/value head."""
    ffn: float = Field(default=0.0, ge=0)
    """Short form of keep_ffn (a number from 1) and of remove_ffn (a number below 1); 0 keeps all neurons."""
    keep_ffn: int = Field(default=0, ge=0, strict=True)
    """Method structured: number of neurons to keep per feed-forward layer."""
    remove_ffn: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Method structured: fraction of the neurons to remove per feed-forward layer."""
    hidden: float = Field(default=0.0, ge=0)
    """Short form of keep_hidden (a number from 1) and of remove_hidden (a number below 1); 0 keeps all channels."""
    keep_hidden: int = Field(default=0, ge=0, strict=True)
    """Method structured: number of hidden channels to keep, the width of the residual stream."""
    remove_hidden: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Method structured: fraction of the hidden channels to remove."""
    multiple: int = Field(default=1, ge=1)
    """Method structured: keep numbers of neurons and hidden channels that are multiples of this value (128 suits
    TPUs)."""
    layers: float = Field(default=0.0, ge=0)
    """Short form of keep_layers (a number from 1) and of remove_layers (a number below 1); 0 keeps all layers."""
    keep_layers: int = Field(default=0, ge=0, strict=True)
    """Method structured: number of layers to keep."""
    remove_layers: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Method structured: fraction of the layers to remove."""
    budget: BudgetConfig = BudgetConfig()
    """Method structured: size of the pruned model, in place of heads, ffn, layers and hidden. A search chooses these by
    the loss on the calibration data, and prints the candidates."""
    importance: ImportanceName = "contribution"
    """Method structured: importance of a head, neuron or channel; the lowest are removed. contribution: norm of what it
    adds to the next outputs. activation: mean norm of its output. taylor: change of the loss without it, to first
    order. magnitude: norm of its weights. random: random numbers. Layers are always selected by block influence."""
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Methods for single weights: fraction of each matrix to set to zero. For wanda, it is a fraction of each output's
    inputs. With an allocation other than uniform, it is the fraction of all matrices together."""
    pattern: str = "unstructured"
    """Methods for single weights: pattern of the zeros. unstructured: zeros at any position. N:M, such as 2:4: keep N
    of every M inputs; N and M determine the sparsity. AxB, such as 128x1: prune blocks of A inputs and B outputs, by
    the sum of their scores."""
    damping: float = Field(default=DAMPING, gt=0, le=1)
    """Method sparsegpt: fraction of the Hessian's mean diagonal entry to add to its diagonal. If a Hessian has no
    inverse, the fraction is multiplied by 10, and the matrix is reported."""

    repair: bool = False
    """After pruning, recompute the kept weights by least squares on the calibration data, so that the outputs of the
    layers stay close to those before pruning."""
    allocation: AllocationName = "uniform"
    """Methods for single weights, except with N:M: sparsity of the layers. uniform: equal in all layers. owl: lower for
    layers with more outliers. sensitivity: lower for layers whose pruning changes the final hidden states more. global:
    the lowest scores of the complete model are pruned. The sparsity of the model is exact."""
    spread: float = Field(default=0.08, gt=0, lt=0.5)
    """Allocations owl and sensitivity. owl: half the difference between the highest and the lowest sparsity of a layer.
    sensitivity: largest difference between the sparsity of a layer and that of the model."""
    outlier: float = Field(default=5.0, gt=0)
    """Allocation owl: score from which a weight is an outlier, as a multiple of the layer's mean score by wanda."""
    store: Literal["dense", "sparse"] = "dense"
    """Methods for single weights: format of the pruned matrices on disk, also in later stages. sparse: store only
    nonzero weights and their positions. In memory, matrices are dense."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """Replace long forms by the short form: keep_layers = 3 becomes layers = 3, remove_layers = 0.75 becomes layers
        = 0.75.

        A finished stage is therefore not repeated if only the form changes. Long forms whose values are out of range
        are not replaced. The validation of their fields then rejects these values.
        """
        if not isinstance(given, dict):
            return given
        given = dict(given)
        for part in PARTS:
            forms = [name for name in (part, f"keep_{part}", f"remove_{part}") if given.get(name)]
            if len(forms) > 1:
                raise ValueError(f"{' and '.join(forms)}: say one of them")
            if forms in ([], [part]):
                continue
            value, keeps = given[forms[0]], forms[0].startswith("keep_")
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            if right and (isinstance(value, int) and value >= 1 if keeps else 0 < value < 1):
                given[part] = float(given.pop(forms[0]))
        return given

    @model_validator(mode="after")
    def _belongs(self) -> Config:
        structured = {"heads", "heads_by", "ffn", "multiple", "layers", "hidden", "budget", "importance"}
        zeros = {"sparsity", "pattern", "damping", "allocation", "spread", "outlier", "store"}
        other = zeros if self.method == STRUCTURED else structured
        if self.method != SPARSEGPT:
            other = other | {"damping"}
        stray = sorted(self.model_fields_set & other)
        if stray:
            instead = "another one, such as 'magnitude'" if self.method == STRUCTURED else repr(STRUCTURED)
            instead = repr(SPARSEGPT) if stray == ["damping"] else instead
            raise ValueError(f"{', '.join(stray)}: not for method {self.method!r}; set method to {instead}")
        sized = [part for part in PARTS if getattr(self, part)]
        if self.budget.asked and (sized or self.heads_by == "queries"):
            instead = " and ".join(sized or ["heads_by"])
            raise ValueError(f"budget chooses the sizes, and removes heads by groups; leave out {instead}, or budget")
        if self.method == STRUCTURED and not (sized or self.budget.asked):
            raise ValueError(
                "structured pruning needs a budget, or at least one of heads, ffn, layers and hidden, such as "
                "keep_layers = 2 (--keep-layers 2) or remove_ffn = 0.5"
            )
        narrows = bool(self.heads or self.ffn or self.hidden or self.budget.asked)
        stray = sorted({"importance", *(["repair"] if self.repair else [])} & self.model_fields_set)
        if self.method == STRUCTURED and stray and not narrows:
            raise ValueError(f"{', '.join(stray)}: for heads, ffn and hidden; layers are selected by block influence")
        try:
            own = Pattern.parse(self.pattern, self.sparsity).sparsity
        except RequestError as e:
            raise ValueError(str(e)) from None
        if "sparsity" in self.model_fields_set and abs(self.sparsity - own) > 1e-9:
            raise ValueError(f"sparsity {self.sparsity} contradicts pattern {self.pattern}, which has {own:g}")
        self._check_allocation(own)
        return self

    def _check_allocation(self, sparsity: float) -> None:
        """Raise a ValueError if the allocation does not fit the other settings."""
        none, both = set[str](), {"outlier", "spread"}
        stray = {"uniform": both, "global": both, "sensitivity": {"outlier"}, "owl": none}[self.allocation]
        if stray := sorted(self.model_fields_set & stray):
            instead = "'owl'" if "outlier" in stray else "'owl' or 'sensitivity'"
            raise ValueError(f"{', '.join(stray)}: not for allocation {self.allocation!r}; set allocation to {instead}")
        if self.allocation == "uniform":
            return
        pattern = Pattern.parse(self.pattern, self.sparsity)
        if pattern.of:
            raise ValueError(
                f"allocation {self.allocation!r} is for unstructured pruning; pattern {self.pattern} has one sparsity"
            )
        if self.allocation == "global":
            if self.method not in (known := comparable()):
                raise ValueError(
                    f"allocation 'global' compares the scores of all matrices, and those of {self.method!r} are "
                    f"comparable within a matrix only; set method to one of {', '.join(known)}"
                )
            return
        if pattern.blocks:
            raise ValueError(
                f"allocation {self.allocation!r} is for unstructured pruning; with pattern {self.pattern}, set "
                "allocation to 'uniform' or 'global'"
            )
        room = min(sparsity, 1 - sparsity)
        if self.allocation == "owl":
            room /= 2  # a layer can differ from the mean by nearly 2 * spread, if all others are at the other end
        if self.spread >= room:
            raise ValueError(f"spread {self.spread:g} is too large for sparsity {sparsity:g}; say less than {room:g}")

    @property
    def structure(self) -> StructuredMethod:
        """Return the configured method of structured pruning, which removes heads, neurons, hidden channels and
        layers.
        """
        return StructuredMethod(self.importance, self.repair, self.seed)

    @property
    def reads_data(self) -> bool:
        """Return whether the stage reads calibration data."""
        return self.method == STRUCTURED or self.zeros.calibrated

    @property
    def zeros(self) -> SparseMethod:
        """Return the configured method of unstructured pruning, which sets single weights to zero."""
        allocation = Allocation(self.allocation, self.spread, self.outlier)
        pattern = Pattern.parse(self.pattern, self.sparsity)
        return SparseMethod(self.method, pattern, self.damping, self.repair, allocation)


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Prune the parent and write the artifact to `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.compress.calibration.layer_files import Saved
    from llmctl.compress.lowrank import merged
    from llmctl.compress.pruning import prune, prune_report, sparse_walk
    from llmctl.compress.structured_pruning import structured_walk
    from llmctl.convert import architectures
    from llmctl.distributed import mesh
    from llmctl.pipeline import console
    from llmctl.train import run_log

    devices = mesh.make(config.mesh)
    base = artifact.load(required(config, parent), devices, bases=config.bases)
    params = merged(base, lambda line: console.say(f"{config.title}: {line}"))
    if config.method == STRUCTURED:
        total = structured_walk.layer_steps(base.model, _sizes(config, base), config.structure)
    else:
        total = (1 + (config.allocation != "uniform")) * (base.model.layers + base.model.encoder_layers)
    with run_log.Reporter(ctx.work, total, config.title, False) as reporter, mesh.use(devices):
        saved = Saved(ctx.work / "layers")
        if config.method == STRUCTURED:
            scan, target, chosen = None, _target(config, base, params, devices), {}
            if asked := config.budget.asked:
                scan, target, chosen["budget"], candidates = structured_walk.choose_sizes(
                    config,
                    base,
                    params,
                    asked,
                    config.structure,
                    devices,
                    multiple=config.multiple,
                    progress=reporter.log_layer,
                )
                _check(config, base, params, target, devices)
                console.note(candidates)
            for line in filter(None, (sizes(config, base.model, target), architectures.notice(target, base.model))):
                reporter.say(line)
            model, params, found = structured_walk.prune_structure(
                config,
                base,
                params,
                target,
                config.structure,
                devices,
                saved=saved,
                progress=reporter.log_layer,
                scan=scan,
            )
            found |= chosen
        else:
            params, layers = sparse_walk.prune_weights(
                config, base, params, config.zeros, devices, seed=config.seed, saved=saved, progress=reporter.log_layer
            )
            model, found = base.model, {"block_sparsity": prune.sparsity(params), "pruned_layers": layers}
            if errors := prune_report.errors(layers):
                found["layer_error"] = errors
            for line in prune_report.fallbacks(layers):
                reporter.say(line)
    if layers := found.get("pruned_layers"):
        console.note(prune_report.table(layers))
    ctx.save(
        config,
        params,
        model,
        parent=base.manifest,
        labels=base.manifest.labels,
        pruned=None if config.method == STRUCTURED else True,
        sparse=True if config.store == "sparse" else None,
        metrics=found | {"parameters_before": base.manifest.parameters, "sparsity_before": base.manifest.sparsity},
        tokenizer_dir=base.tokenizer_dir,
    )


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return the programs that the stage compiles, and the pruned artifact as shapes without values. Nothing is run.

    The programs calibrate the layers, and prune the largest matrix.
    """
    from llmctl.artifacts import abstract_artifact
    from llmctl.compress import programs
    from llmctl.compress.pruning import prune, pruning_programs
    from llmctl.compress.structured_pruning import structured_programs
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
    target = _target(config, base, params, mesh)
    small = functional.laid_out(target, functional.abstract(target), mesh)
    method = config.structure
    walk = programs.Walk.of(config, base, mesh, method.gradients)
    found = structured_programs.structured_pruning(base.model, params, target, method, mesh, walk)
    return found, abstract_artifact.abstract_result(config, small, target, base=base)


def _target(config: Config, base: Artifact, params: dict[str, Any], mesh: Mesh) -> ModelConfig:
    """Return the model's config after structured pruning.

    Raises:
      RequestError: If the model cannot be pruned to these sizes, or the mesh cannot shard them.
    """
    target = _sizes(config, base)
    _check(config, base, params, target, mesh)
    return target


def _check(config: Config, base: Artifact, params: dict[str, Any], target: ModelConfig, mesh: Mesh) -> None:
    """Check that the model can be pruned to the sizes of `target`, and that the mesh can shard them.

    Raises:
      RequestError: If the model cannot be pruned to these sizes, or the mesh cannot shard them.
    """
    from llmctl.compress.structured_pruning import channel_cut, shrink, structured_walk
    from llmctl.model import functional

    structured_walk.check(base, params, config.structure)
    functional.shardings(target, functional.abstract(target), mesh)  # raises if the mesh cannot split the sizes
    shrink.check_cuttable(base.model, params, target)
    channel_cut.check(base.model, params, target.d_model)


def _sizes(config: Config, base: Artifact) -> ModelConfig:
    """Return the model's config after structured pruning. With a budget, the sizes are estimated from uniform pruning
    ratios.

    Raises:
      RequestError: If the sizes are impossible.
    """
    from llmctl.compress.structured_pruning import budget, shrink, structured_walk

    if asked := config.budget.asked:
        size, wanted = structured_walk.budget_of(config, base, asked)
        return budget.uniform(base.model, wanted, size, config.multiple)
    return shrink.target(
        base.model, heads=config.heads, ffn=config.ffn, layers=config.layers, hidden=config.hidden,
        by=config.heads_by, multiple=config.multiple,
    )  # fmt: skip


def sizes(config: Config, before: ModelConfig, after: ModelConfig) -> str:
    """Return one line about structured pruning: the settings, and each size before and after."""
    fields = {"layers": "layers", "heads": "heads", "ffn": "d_ff", "hidden": "d_model"}
    if budget := config.budget.asked:
        changes = [f"{part} {getattr(before, f)} → {getattr(after, f)}" for part, f in fields.items()]
        return f"budget.{budget[0]} = {budget[1]:g}: {', '.join(changes)}"
    parts = []
    for part, field in fields.items():
        asked, old, new = getattr(config, part), getattr(before, field), getattr(after, field)
        if asked:
            line = f"{'remove' if asked < 1 else 'keep'}_{part} = {asked:g}: {part} {old} → {new}"
            if part == "layers" and before.encoder_layers:
                line += f", encoder {before.encoder_layers} → {after.encoder_layers}"
            parts.append(line)
    return "; ".join(parts)
