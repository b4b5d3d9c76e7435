"""Define the stage `eval`, which measures artifacts on held-out data.

Every result has the digest of the measured weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from llmctl.artifacts.workspace import Context
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.tasks.registry import TASKS, of
from llmctl.pipeline.stage import StageConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact, Manifest
    from llmctl.data.splits import Examples
    from llmctl.pipeline.stage import Programs


T = TypeVar("T")


class Config(MeasureConfig, StageConfig):
    """Measure accuracy, perplexity, size and speed of artifacts on the same held-out examples."""

    common: ClassVar[tuple[str, ...] | None] = (
        "of",
        "split",
        "examples",
        "batch_size",
        "harness",
        "speed",
        "plot",
        "again",
    )
    produces: ClassVar[bool] = False
    # Speed depends on mesh and platform.
    unkeyed: ClassVar[frozenset[str]] = frozenset({"name", "parent", "base", "allow_nonfinite", "replace", "again"})
    artifact_fields: ClassVar[tuple[str, ...]] = ("of", "draft_of")
    added: ClassVar[frozenset[str]] = MeasureConfig.added | {"draft_of"}

    kind: Literal["eval"] = "eval"
    of: list[str] = []
    """Artifacts to measure; all models of earlier stages by default."""
    draft_of: str = ""
    """Target model of speculative decoding, for which the artifacts are drafts. If set, the results contain the
    fraction of a draft's tokens that the target accepts."""
    data: DataConfig = DataConfig()
    """Data set. The setting `split` selects the part on which artifacts are measured."""
    plot: bool = True
    """Plot quality against size as tradeoff.png, and the predictions of classifiers as classes.png. Requires matplotlib
    (extra `demo`)."""

    @property
    def reads_data(self) -> bool:
        """Return whether a task reads the data. Task files and tasks of lm-evaluation-harness have their own data."""
        return self.measures_data


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Evaluate the artifacts in the setting `of`, and write the results to `ctx.out`. If `of` names no artifact,
    evaluate the parent.

    The files are results.json, table.md, tradeoff.png, predictions.jsonl and, for classifiers, classes.png. The file
    predictions.jsonl has the generated texts of a task, or the wrong predictions of a classifier.
    """
    from llmctl.artifacts import artifact
    from llmctl.distributed import mesh
    from llmctl.evaluate import runner, stored
    from llmctl.pipeline import console

    chosen = measured(config, ctx.siblings) or ({parent.name: parent} if parent else {})
    if not chosen:
        raise RequestError("eval: nothing to measure; say --from ARTIFACT, or name artifacts in `of`")
    if config.plot:
        _can_draw()
    if config.harness:
        from llmctl.evaluate.harness import task_loading

        task_loading.check_installed()
    examples = _examples(config, chosen.values()) if config.reads_data else None
    before = stored.Stored([]) if config.again else stored.read(ctx.out, ctx.work)
    with mesh.use(mesh.make(config.mesh)) as devices:
        kept: list[dict[str, Any]] = []
        results = runner.results(
            config, chosen, examples, devices, ctx.work / "corpus", console.say, kept.append, config.bases,
            ctx.siblings.get(config.draft_of), before,
        )  # fmt: skip
    write(ctx, config, results, artifact.read_manifest(list(chosen.values())[-1]), kept)


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return (programs that score each artifact, None). The value None means that eval writes no model."""
    from llmctl.evaluate import programs

    chosen = measured(config, others) or ({base.path.name: base} if base else {})
    if not chosen:
        raise RequestError("eval: nothing to measure; say --from ARTIFACT, or name artifacts in `of`")
    target = others.get(config.draft_of)
    return [p for name in chosen for p in programs.scoring(config, config.data, name, chosen, mesh, target)], None


def measured(config: Config, named: Mapping[str, T]) -> dict[str, T]:
    """Return the artifacts to measure. The artifact in `draft_of` is not one of these artifacts, unless `of` names
    it."""
    return {name: one for name, one in named.items() if name != config.draft_of or name in config.of}


def _examples(config: Config, paths: Iterable[Path]) -> Examples:
    """Read the held-out examples on which the artifacts are measured, and print the number of rows per split."""
    from llmctl.artifacts import artifact
    from llmctl.data import splits
    from llmctl.pipeline import console

    tasks = [TASKS[t] for t in config.named_tasks] or [of(artifact.read_manifest(path)) for path in paths]
    labels, conversations = any(t.reads_labels for t in tasks), any(t.reads_conversations for t in tasks)
    loaded = splits.load(config.data, labels=labels, conversations=conversations)
    console.say(f"{config.title}: {loaded.describe()}")
    examples = loaded[config.split]
    return examples.sample(config.examples) if config.examples else examples


def _can_draw() -> None:
    """Check that matplotlib is installed, before the evaluation starts.

    Raises:
      RequestError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("eval: the picture needs matplotlib: pip install 'llmctl[demo]', or say plot = false")


def write(
    ctx: Context, config: Config, results: list[dict[str, Any]], last: Manifest, kept: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the results as an artifact without parameters.

    The digest of the artifact excludes times and bytes on disk, because they vary between runs.
    """
    from llmctl.artifacts import artifact, atomic
    from llmctl.distributed import processes
    from llmctl.evaluate import classes_plot, report, tradeoff_plot

    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic.writing(ctx.out) as draft:
        if not processes.first():
            return
        (draft / "results.json").write_text(text + "\n", encoding="utf-8")
        if kept:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            (draft / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        (draft / "table.md").write_text(report.markdown(results), encoding="utf-8")
        if config.plot:
            tradeoff_plot.tradeoff(results, draft / "tradeoff.png")
            classes_plot.classes(results, draft / "classes.png")
        manifest = artifact.Manifest(
            format=artifact.FORMAT,
            name=config.name or ctx.out.name,
            stage="eval",
            key=ctx.key,
            family=last.family,
            model=last.model,
            parameters=0,
            bytes=0,
            sparsity=0.0,
            bits=0.0,
            digest=hashlib.sha256(json.dumps(report.determined(results), sort_keys=True).encode()).hexdigest(),
            parent=last.as_parent(),
            config=keyed(config),
            versions=artifact.versions(),
        )
        artifact.write_manifest(draft, manifest)
