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
    from llmctl.data.splits import Examples, Splits
    from llmctl.evaluate.stored import Scored
    from llmctl.evaluate.tasks.base import Task
    from llmctl.pipeline.stage import Programs


T = TypeVar("T")


class Config(MeasureConfig, StageConfig):
    """Measure accuracy, perplexity, size and speed of artifacts on the same held-out examples."""

    common: ClassVar[tuple[str, ...] | None] = (
        "of",
        "against",
        "split",
        "examples",
        "batch_size",
        "tasks",
        "harness",
        "speed",
        "plot",
        "yardstick",
        "again",
    )
    produces: ClassVar[bool] = False
    # Speed depends on mesh and platform.
    unkeyed: ClassVar[frozenset[str]] = frozenset({"name", "parent", "base", "allow_nonfinite", "replace", "again"})
    artifact_fields: ClassVar[tuple[str, ...]] = ("of", "draft_of", "against")
    keyed_artifact_fields: ClassVar[tuple[str, ...]] = ("against", "draft_of")
    added: ClassVar[frozenset[str]] = MeasureConfig.added | {"draft_of", "against"}

    kind: Literal["eval"] = "eval"
    of: list[str] = []
    """Artifacts to measure; all models of earlier stages by default."""
    against: str = ""
    """Artifact with which the others are compared on the same examples. The differences have 95 % intervals (paired
    bootstrap) and p-values."""
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
        """Return whether a task or a probe reads the data. Task files and tasks of lm-evaluation-harness have their own
        data."""
        return bool(self.tasks_on_data)


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Evaluate the artifacts in the setting `of`, and write the results to `ctx.out`. If `of` names no artifact,
    evaluate the parent.

    The files are results.json, table.md, tradeoff.png, predictions.jsonl, example_values.jsonl and, for classifiers,
    classes.png. The file predictions.jsonl has the generated texts of a task, or the wrong predictions of a classifier.
    The file example_values.jsonl has the values per example of the metrics. If artifacts are compared, the file
    comparisons.json has the differences.
    """
    from llmctl.artifacts import artifact
    from llmctl.distributed import mesh
    from llmctl.evaluate import bootstrap_intervals, comparison, report, runner, stored, yardstick
    from llmctl.pipeline import console

    chosen = measured(config, ctx.siblings) or ({parent.name: parent} if parent else {})
    check_chosen(config, chosen)
    if config.plot:
        _can_draw()
    if config.harness:
        from llmctl.evaluate.harness import task_loading

        task_loading.check_installed()
    tasks = tasks_of_data(config, chosen.values())
    if config.yardstick:
        yardstick.check(config, tasks)
    data = _splits(config, tasks) if config.reads_data else None
    examples = _examples(config, data) if data else None
    before = stored.Stored([]) if config.again else stored.read(ctx.out, ctx.work)
    with mesh.use(mesh.make(config.mesh)) as devices:
        found = runner.results(
            config, chosen, examples, devices, ctx.work / "corpus", console.say, config.bases,
            ctx.siblings.get(config.draft_of), before, config.against, bool(config.bootstrap),
            data["train"] if data and config.reads_training else None,
        )  # fmt: skip
    if config.yardstick and data and examples:
        console.say(f"{config.title}: training the yardstick on {len(data['train']):,} examples")
        found.append(yardstick.measure(config, data, examples, before))
        console.say(f"{report.YARDSTICK}: {report.headline(found[-1].result)}")
    found = [bootstrap_intervals.with_intervals(scored, config.bootstrap, config.seed) for scored in found]
    compared: list[dict[str, Any]] = []
    if config.against:
        compared = comparison.compare(found, config.against, config.seed, console.say)
    write(ctx, config, found, artifact.read_manifest(list(chosen.values())[-1]), compared)


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return (programs that score each artifact, None). The value None means that eval writes no model."""
    from llmctl.evaluate import programs

    chosen = measured(config, others) or ({base.path.name: base} if base else {})
    check_chosen(config, chosen)
    target = others.get(config.draft_of)
    return [p for name in chosen for p in programs.scoring(config, config.data, name, chosen, mesh, target)], None


def measured(config: Config, named: Mapping[str, T]) -> dict[str, T]:
    """Return the artifacts to measure. The target model in `draft_of` is measured only if `of` names it."""
    return {name: one for name, one in named.items() if name != config.draft_of or name in config.of}


def check_chosen(config: Config, chosen: Mapping[str, Any]) -> None:
    """Check that there is an artifact to measure. If `against` is set, check that it can be compared with another one.

    Raises:
      RequestError: If no artifact is chosen. If only `against` is chosen. If `against` is not measured.
    """
    if not chosen:
        raise RequestError("eval: nothing to measure; say --from ARTIFACT, or name artifacts in `of`")
    if config.against and not chosen.keys() - {config.against}:
        raise RequestError(
            f"eval: against: there is nothing to compare with {config.against}; name another artifact with --from or "
            "`of`, by its folder if both have one name"
        )
    if config.against and config.against not in chosen:
        raise RequestError(f"eval: against: {config.against} is the target in draft_of and is not measured")


def tasks_of_data(config: Config, paths: Iterable[Path]) -> list[Task]:
    """Return the tasks that read the evaluation data; [] if no task and no probe reads this data.

    These are the tasks that the setting `tasks` names or, if it names none, the tasks of the artifacts. The tasks of
    probes that read the data are included.
    """
    from llmctl.artifacts import artifact

    if not config.reads_data:
        return []
    own = [of(artifact.read_manifest(path)) for path in paths]
    return [task for name in config.tasks_on_data for task in ([TASKS[name]] if name else own)]


def _splits(config: Config, tasks: Sequence[Task]) -> Splits:
    """Read the data for tasks, and print the number of rows per split."""
    from llmctl.data import splits
    from llmctl.pipeline import console

    labels, conversations = any(t.reads_labels for t in tasks), any(t.reads_conversations for t in tasks)
    loaded = splits.load(config.data, labels=labels, conversations=conversations)
    console.say(f"{config.title}: {loaded.describe()}")
    return loaded


def _examples(config: Config, loaded: Splits) -> Examples:
    """Return the held-out examples on which the artifacts are measured."""
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
    ctx: Context, config: Config, found: Sequence[Scored], last: Manifest, compared: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the results as an artifact without parameters.

    The digest of the artifact excludes times and bytes on disk, because they vary between runs.
    """
    from llmctl.artifacts import artifact, atomic
    from llmctl.distributed import processes
    from llmctl.evaluate import classes_plot, comparison, report, stored, tradeoff_plot

    results = [scored.result for scored in found]
    with atomic.writing(ctx.out) as draft:
        if not processes.first():
            return
        stored.write(found, draft)
        comparison.write(compared, draft)
        (draft / "table.md").write_text(report.markdown(results, compared), encoding="utf-8")
        if config.plot:
            tradeoff_plot.tradeoff(results, draft / "tradeoff.png")
            classes_plot.classes(results, draft / "classes.png")
        determined = [*report.determined(results), *compared]
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
            digest=hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest(),
            parent=last.as_parent(),
            config=keyed(config),
            versions=artifact.versions(),
        )
        artifact.write_manifest(draft, manifest)
