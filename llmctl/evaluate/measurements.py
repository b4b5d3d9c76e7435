"""Describe the measurements of an evaluation before they are made: tasks, settings, and digests of definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jax.sharding import Mesh

from llmctl.artifacts import artifact
from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.config.errors import RequestError
from llmctl.data.splits import Examples
from llmctl.evaluate import stored, task_files
from llmctl.evaluate.probes.base import Probe
from llmctl.evaluate.probes.registry import PROBES
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks import registry
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.model.config import ModelConfig


@dataclass(frozen=True)
class Measurement:
    """Describe one measurement of one artifact, before the measurement is made."""

    timed: ClassVar[bool] = True
    """Whether the speed of the artifact is measured too."""

    config: MeasureConfig
    """Settings of the evaluation, overridden by the settings of a task file."""
    setup: Setup
    definition: str
    """Digest of the task, the data and the settings."""

    @property
    def label(self) -> str:
        """Return the name by which the result and its records are stored."""
        raise NotImplementedError

    def measure(self, artifact: Artifact) -> Measured:
        """Measure the artifact, whose arrays are on the devices."""
        raise NotImplementedError

    def compares(self, model: ModelConfig) -> bool:
        """Return whether the measurement has values per example, so that two artifacts can be compared."""
        raise NotImplementedError


@dataclass(frozen=True)
class TaskMeasurement(Measurement):
    """Describe the measurement of one artifact on a task."""

    task: Task
    held: Held
    name: str = ""
    """Name of the task's file; empty if the task has the data of the evaluation."""

    @property
    def label(self) -> str:
        """Return the name of the task's file. If the task has no file, return the name of the task."""
        return self.name or self.task.name

    def measure(self, artifact: Artifact) -> Measured:
        """Measure the artifact on the task."""
        return self.task.evaluate(artifact, self.held, self.setup)

    def compares(self, model: ModelConfig) -> bool:
        """Return whether the task has values per example, so that two artifacts can be compared."""
        return self.task.compares(model, self.held.examples.columns)


@dataclass(frozen=True)
class ProbeMeasurement(Measurement):
    """Describe the measurement of one artifact by a probe."""

    timed: ClassVar[bool] = False

    probe: Probe
    held: Held | None
    """Held-out examples; None if the probe does not read them."""

    @property
    def label(self) -> str:
        """Return the name of the probe."""
        return self.probe.name

    def measure(self, artifact: Artifact) -> Measured:
        """Measure the artifact by the probe."""
        return self.probe.measure(artifact, self.held, self.setup, probe_settings(self.config, self.probe))

    def compares(self, model: ModelConfig) -> bool:
        """Return whether the probe has values per example, so that two artifacts can be compared."""
        return self.probe.compares


def probe_settings(config: MeasureConfig, probe: Probe) -> Any:
    """Return the section of the settings that belongs to a probe; None if the probe has no settings."""
    return getattr(config, probe.section) if probe.section else None


def check_probes(config: MeasureConfig, manifest: Manifest, where: str) -> None:
    """Check that all probes of the evaluation support an artifact.

    Raises:
        RequestError: If a probe does not support the artifact.
    """
    for probe in (PROBES[name] for name in config.named_probes):
        probe.check_model(manifest, probe_settings(config, probe), where)


def probes_generate(config: MeasureConfig, manifest: Manifest) -> bool:
    """Return whether a probe of the evaluation generates answers."""
    probes = [PROBES[name] for name in config.named_probes]
    return any(probe.generates(manifest, probe_settings(config, probe)) for probe in probes)


def tasks_of(config: MeasureConfig, manifest: Manifest) -> list[Task]:
    """Return the tasks on which an artifact is measured with the data of the evaluation."""
    if not config.measures_task:
        return []
    return [registry.TASKS[t] for t in config.named_tasks] or [registry.of(manifest)]


def of_data(
    config: MeasureConfig,
    mesh: Mesh,
    path: Path,
    manifest: Manifest,
    tasks: Sequence[Task],
    examples: Examples | None,
    folder: Path,
    target: str,
) -> list[Measurement]:
    """Describe the measurements of one artifact on held-out examples, one per task."""
    if not tasks:
        return []
    assert examples is not None
    settings, held = setup(config, mesh, path, manifest), Held(examples, config.split, folder)
    return [
        TaskMeasurement(config, settings, stored.definition(config, task, held, settings, target), task, held)
        for task in tasks
    ]


def of_probes(
    config: MeasureConfig,
    mesh: Mesh,
    path: Path,
    manifest: Manifest,
    examples: Examples | None,
    folder: Path,
    training: Examples | None = None,
) -> list[Measurement]:
    """Describe the measurements of one artifact by the probes of the evaluation.

    `training` is the train split of the data, for probes that read it.
    """
    found = []
    for probe in (PROBES[name] for name in config.named_probes):
        read = training if probe.reads_training else None
        held = Held(examples, config.split, folder, read) if probe.reads_data and examples is not None else None
        setup = probe_setup(config, mesh, path, manifest)
        settings = probe_settings(config, probe)
        parts = [read.digest] if read is not None else []
        parts += [setup.generation.model_dump()] if probe.generates(manifest, settings) else []
        parts += [manifest.tokenizer] if probe.tokenizes else []
        digest = stored.digest(probe.name, probe.definition(settings), *stored.conditions(held, setup), *parts)
        found.append(ProbeMeasurement(config, setup, digest, probe, held))
    return found


def probe_setup(config: MeasureConfig, mesh: Mesh, path: Path, manifest: Manifest) -> Setup:
    """Return the settings for the measurement of one artifact by a probe.

    For imports, the length of the training texts is unknown. Their sequence length is 512, but at most the model's
    maximum.
    """
    return setup(config.model_copy(update={"seq_len": _seq_len(config.seq_len, manifest)}), mesh, path, manifest)


def _seq_len(given: int, manifest: Manifest) -> int:
    """Return the sequence length to set in the settings of a measurement; 0 stands for the length in training.

    The result is `given` if `given` is not 0. Otherwise, the result is 0 if the length in training is known. If that
    length is unknown, the result is 512, but at most the model's maximum.
    """
    return given or (0 if manifest.seq_len else min(512, manifest.model.max_seq_len))


def check_comparable(
    wanted: Mapping[str, Sequence[Measurement]], manifests: Mapping[str, Manifest], against: str
) -> None:
    """Check that all artifacts are measured on the same tasks, with the same settings, and with values per example.

    Args:
        wanted: Measurements of each artifact, by name.
        manifests: Manifest of each artifact, by name.
        against: Name of the artifact with which the others are compared.

    Raises:
        RequestError: If two artifacts cannot be compared.
    """
    theirs = {m.label: m for m in wanted[against]}
    for name, each in wanted.items():
        mine = {m.label: m for m in each}
        if mine.keys() != theirs.keys():
            ours, others = (", ".join(labels) for labels in (mine, theirs))
            raise RequestError(f"against: {name} is measured on {ours}, and {against} on {others}; name one in tasks")
        for label, one in mine.items():
            if not one.compares(manifests[name].model):
                raise RequestError(f"against: {name}: task {label} has no values per example to compare")
            if one.definition != theirs[label].definition:
                a, b = (vars(m.setup) for m in (one, theirs[label]))
                apart = ", ".join(f"{k} {a[k]} and {b[k]}" for k in a if k != "mesh" and a[k] != b[k])
                if not apart:
                    raise RequestError(
                        f"against: {name} and {against} have different tokenizers, and {label} is measured on tokens"
                    )
                raise RequestError(
                    f"against: {name} and {against} are measured differently on {label} ({apart}); set it for both"
                )


def file_settings(config: MeasureConfig, file: task_files.TaskFile, manifest: Manifest) -> MeasureConfig:
    """Return the settings by which one artifact is measured on the task of a file.

    Settings of the file override settings of `config`.
    """
    own: dict[str, Any] = {"tasks": [file.task], "harness": [], "metrics": file.metrics, "split": file.split}
    own |= {"seq_len": _seq_len(file.seq_len or config.seq_len, manifest)}
    if "generation" in file.model_fields_set:
        own["generation"] = file.generation
    return config.model_copy(update=own)


def of_file(
    config: MeasureConfig, mesh: Mesh, path: Path, manifest: Manifest, file: task_files.LoadedTask, folder: Path
) -> Measurement:
    """Describe the measurement of one artifact on the task that a task file defines."""
    own, task = file_settings(config, file.config, manifest), registry.TASKS[file.config.task]
    settings, held = setup(own, mesh, path, manifest), Held(file.examples, own.split, folder / file.name)
    digest = stored.digest(stored.definition(own, task, held, settings), file.digest)
    return TaskMeasurement(own, settings, digest, task, held, file.name)


def setup(config: MeasureConfig, mesh: Mesh, path: Path, manifest: Manifest) -> Setup:
    """Return the settings for the measurement of one artifact.

    A setting of the evaluation overrides the value that the artifact has from training.

    Raises:
        RequestError: If the sequence length is unknown or exceeds the model's maximum, or if the stride exceeds the
            sequence length.
    """
    seq_len = config.seq_len or manifest.seq_len
    if not seq_len:
        raise RequestError(f"{path}: does not say how long its training texts were; say it with seq_len")
    if seq_len > manifest.model.max_seq_len:
        raise RequestError(
            f"{path}: seq_len {seq_len} is longer than its longest sequence ({manifest.model.max_seq_len})"
        )
    stride = config.stride or seq_len
    if stride > seq_len:
        raise RequestError(f"stride ({stride}) is longer than the context ({seq_len}): tokens would go unscored")
    truncate = config.truncate or manifest.truncate or "tail"
    return Setup(mesh, seq_len, stride, config.batch_size, truncate, config.dtype, _generation(config, manifest))


def _generation(config: MeasureConfig, manifest: Manifest) -> GenerationConfig:
    """Return the settings for generating answers: values that the user set for this evaluation, otherwise the values of
    training.
    """
    given = {name: getattr(config.generation, name) for name in generation_fields(config)}
    return GenerationConfig.of(artifact.generation_settings(manifest) | given)


def generation_fields(config: MeasureConfig) -> set[str]:
    """Return the names of the settings in `config.generation` that the user set."""
    return config.generation.model_fields_set if "generation" in config.model_fields_set else set()
