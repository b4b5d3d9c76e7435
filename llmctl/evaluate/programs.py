"""List the compiled programs of an evaluation for the cost model: one program per artifact and task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.data.config import DataConfig
from llmctl.data.examples import synthetic
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import acceptance, likelihood, measurements, task_files
from llmctl.evaluate.batch_sizes import balanced
from llmctl.evaluate.harness import evaluation as harness
from llmctl.evaluate.probes.registry import PROBES
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.registry import TASKS, of
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import attention_kernels, flops, weights
from llmctl.model.config import ModelConfig
from llmctl.model.program import Pass, Program


def scoring(
    config: MeasureConfig,
    data: DataConfig,
    name: str,
    chosen: Mapping[str, Artifact],
    mesh: Mesh,
    target: Artifact | None = None,
) -> list[Program]:
    """Return the programs that evaluate one artifact. Each task has programs that score a batch and generate answers.

    If speed is measured, the parameters of all artifacts are in memory at the same time.

    Args:
        config: Settings of the evaluation.
        data: Data settings, which determine the columns of a batch.
        name: Name of the artifact to score.
        chosen: All artifacts of the evaluation by name, with abstract arrays.
        mesh: The device mesh.
        target: Language model for which the artifact is a draft; None measures no acceptance.
    """
    programs = [_harness(config, name, chosen[name], mesh)] if config.harness else []
    for file in config.files_of_tasks:
        told = task_files.read(file)
        own = scoring(measurements.file_settings(config, told, chosen[name].manifest), told.data, name, chosen, mesh)
        programs += [replace(program, title=f"{program.title}: {Path(file).stem}") for program in own]
    for probe in (PROBES[probe] for probe in config.named_probes):
        setup = measurements.probe_setup(config, mesh, Path(name), chosen[name].manifest)
        settings = measurements.probe_settings(config, probe)
        probe.check_model(chosen[name].manifest, settings, name)
        programs += probe.programs(name, chosen[name], data, setup, settings)
    if not config.measures_task:
        return programs
    tasks = [TASKS[task] for task in config.named_tasks] or [of(chosen[name].manifest)]
    if target:
        acceptance.check(chosen[name].manifest, target.manifest, name)
        acceptance.check_tasks(tasks, name)
    setup = measurements.setup(config, mesh, Path(name), chosen[name].manifest)
    for task in tasks:
        title = f"scoring of {name}" + (f" on {task.title}" if len(config.named_tasks) > 1 else "")
        others = unshared(chosen[name], chosen.values()) if config.speed else []
        task.check_model(chosen[name].model, name)
        programs.append(of_task(title, chosen[name], data, setup, task, others))
        if target:
            programs.append(_acceptance(data, name, chosen[name], target, setup, task))
        sizes = {"seq_len": setup.seq_len, "batch_size": setup.batch_size, "dtype": setup.dtype}
        programs += task.generation_programs(chosen[name].model, chosen[name].params, setup.generation, mesh, **sizes)
    return programs


def _harness(config: MeasureConfig, name: str, there: Artifact, mesh: Mesh) -> Program:
    """Return the program that scores requests of lm-evaluation-harness in rows of the shortest standard length.

    Each row has one context with two continuations.

    Depending on the texts, an evaluation also uses longer rows. It then puts fewer rows into a batch, so that all
    batches have about the same number of tokens.
    """
    harness.check_model(there.model, name)
    sizes = {"seq_len": config.seq_len, "batch_size": config.batch_size, "dtype": config.dtype}
    setup = harness.setup(mesh, there.manifest, name, **sizes)
    length = min(likelihood.SHORTEST, setup.seq_len)
    sequence = likelihood.ScoredSequence((0,) * (length - 2), {(k,): length - 2 + k for k in range(2)}, [(0, 0, 0)])
    return of_likelihoods(f"likelihoods of {name} for lm-evaluation-harness", there, setup, sequence)


def of_likelihoods(title: str, there: Artifact, setup: Setup, sequence: likelihood.ScoredSequence) -> Program:
    """Return the program that scores tokens in packed rows of the shortest standard length.

    Args:
        title: Title of the program.
        there: Language model with abstract arrays.
        setup: Settings of the measurement.
        sequence: Content of one row, which determines the number of scored positions.
    """
    length = min(likelihood.SHORTEST, setup.seq_len)
    rows = likelihood.PackedRows([[sequence]], length)
    setup = setup.sized(balanced(setup.mesh, setup.batch_size * likelihood.LEAST // length, 2**31))
    row = {key: a[0] for key, a in rows.batch(np.zeros(1, int)).items() if key in rows.reads}
    batch, step = setup.batches().abstract(row), likelihood.position_scores(there.model, setup.dtype)

    def trace() -> Any:
        with meshes.use(setup.mesh), attention_kernels.use("auto"):
            return step.trace(there.params, batch)

    return Program(
        title,
        there.model,
        setup.mesh,
        trace,
        flops=flops.row(there.model, length, 0, len(row["at"])) * setup.batch_size,
        tokens=setup.batch_size * length,
        rows=setup.batch_size,
        seq_len=length,
        dtype=setup.dtype,
        parameters=[there.params],
        batch=batch,
        work=Pass(predicted=len(row["at"]) / length),
    )


def of_task(
    title: str, artifact: Artifact, data: DataConfig, setup: Setup, task: Task, others: Sequence[Any] = ()
) -> Program:
    """Return the program that scores a batch of a task.

    Args:
        title: Title of the program.
        artifact: Artifact with abstract arrays.
        data: Data settings, which determine the columns of a batch.
        setup: Settings of the measurement.
        task: The task.
        others: Parameters of other artifacts that are in memory at the same time.
    """
    model, params, mesh = artifact.model, artifact.params, setup.mesh
    step, batch = task.scorer(model, setup.dtype), example_batch(data, task, model, setup)
    tokens = sum(a.size for key, a in batch.items() if key in ("tokens", "encoder_tokens"))

    def trace() -> Any:
        with meshes.use(mesh), attention_kernels.use("auto"):
            return step.trace(params, batch)

    return Program(
        title,
        model,
        mesh,
        trace,
        flops=flops.of_rows(model, {key: a.shape[1:] for key, a in batch.items()}) * tokens,
        tokens=tokens,
        rows=setup.batch_size,
        seq_len=setup.seq_len,
        dtype=setup.dtype,
        parameters=[params, list(others)],
        batch=batch,
        beside=list(others),
        work=Pass(written=batch["tokens"].shape[1] if "encoder_tokens" in batch else 0),
    )


def unshared(first: Artifact, others: Iterable[Artifact]) -> list[dict[str, Any]]:
    """Return the arrays that other artifacts add to those already in memory, {name: array} per artifact.

    Adapters of one base share its arrays with each other and with the base (`llmctl.artifacts.artifact.load_each`).

    Args:
        first: Artifact whose arrays are in memory.
        others: Other artifacts. `first` may be one of them.
    """

    def base(there: Artifact) -> str:
        origin = there.manifest.base or there.manifest
        return origin.content or origin.digest or origin.name  # artifacts of a planned recipe have no digest

    held, found = {base(first)}, []
    for there in others:
        if there is first:
            continue
        named, inner = weights.arrays(there.params), there.manifest.base
        if base(there) in held:
            named = {name: named[name] for name in inner.stored} if inner else {}
        held.add(base(there))
        found.append(named)
    return found


def _acceptance(data: DataConfig, name: str, draft: Artifact, target: Artifact, setup: Setup, task: Task) -> Program:
    """Return the program that measures the acceptance: the fraction of a draft's tokens that a target accepts."""
    step = acceptance.scorer(task, (draft.model, target.model), setup.dtype)
    text = synthetic.SyntheticText(data, task.columns, setup.seq_len)
    row = task.rows(draft.model, text.splits["train"], synthetic.TOKENIZER, RowSettings(setup.seq_len))[0]
    batch = setup.batches().abstract(row)
    tokens = sum(a.size for key, a in batch.items() if key in ("tokens", "encoder_tokens"))
    shapes = {key: a.shape[1:] for key, a in batch.items()}
    used, beside = (flops.of_rows(cfg, shapes) * tokens for cfg in (draft.model, target.model))

    def trace() -> Any:
        with meshes.use(setup.mesh), attention_kernels.use("auto"):
            return step.trace((draft.params, target.params), batch)

    return Program(
        f"acceptance of {name}", draft.model, setup.mesh, trace, flops=used + beside, tokens=tokens,
        rows=setup.batch_size, seq_len=setup.seq_len, dtype=setup.dtype, parameters=[draft.params, target.params],
        batch=batch, work=Pass(beside=beside, written=batch["tokens"].shape[1] if "encoder_tokens" in batch else 0),
    )  # fmt: skip


def example_batch(data: DataConfig, task: Task, model: ModelConfig, setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Return an abstract batch of the task: shapes, dtypes and shardings of its arrays, by name."""
    text = synthetic.SyntheticText(data, task.columns, setup.seq_len)
    row = task.rows(model, text.splits["train"], synthetic.TOKENIZER, RowSettings(setup.seq_len))[0]
    row = {key: row[key] for key in task.reads or row if key in row}
    return setup.batches().abstract(row)
