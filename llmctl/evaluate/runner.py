"""Evaluate artifacts: compute the metrics of each artifact, then time all artifacts in alternation."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llmctl.artifacts import artifact
from llmctl.artifacts.artifact import Manifest
from llmctl.config.errors import RequestError
from llmctl.data.splits import Examples
from llmctl.evaluate import acceptance, measurements, speed, task_files
from llmctl.evaluate.harness import evaluation as harness
from llmctl.evaluate.measurements import Measurement, TaskMeasurement
from llmctl.evaluate.metrics.base import METRICS
from llmctl.evaluate.report import Result, headline
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Measured, Setup
from llmctl.evaluate.stored import Scored, Stored, identity
from llmctl.evaluate.tasks import registry
from llmctl.evaluate.tasks.base import Task
from llmctl.model.generate import served


def results(
    config: MeasureConfig,
    chosen: Mapping[str, Path],
    examples: Examples | None,
    mesh: Mesh,
    work: Path,
    say: Callable[[str], None],
    bases: Sequence[Path] = (),
    target: Path | None = None,
    before: Stored | None = None,
    against: str = "",
    values: bool = False,
    training: Examples | None = None,
) -> list[Scored]:
    """Measure artifacts on held-out examples and on tasks of lm-evaluation-harness. If `config.speed` is set, also time
    the artifacts.

    Args:
        config: Tasks, metrics, batch size and speed settings.
        chosen: Folder of each artifact, by name.
        examples: Held-out examples; None if only tasks of the harness are measured.
        mesh: The device mesh.
        work: Folder for tokenized examples.
        say: Function that is called with one line of text per result.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.
        target: Folder of a language model for which the artifacts are drafts (see `llmctl.evaluate.acceptance`).
        before: Earlier results, which are not computed again.
        against: Name of the artifact with which all other artifacts will be compared; empty for no comparison.
        values: Whether earlier results without values per example are computed again.
        training: Train split of the data, for probes that read it.

    Returns:
        One result per artifact and task (see `llmctl.evaluate.report`), with its records and values per example.

    Raises:
        RequestError: If an artifact cannot be measured. All artifacts are checked before the first measurement.
    """
    before = before or Stored([])
    manifests = {name: artifact.read_manifest(path) for name, path in chosen.items()}
    asked = {name: measurements.tasks_of(config, m) for name, m in manifests.items()}
    files = [task_files.load(file, config.examples) for file in config.files_of_tasks]
    harness_setups: dict[str, Setup] = {}
    for name, manifest in manifests.items():
        for task, metrics in [
            *((task, config.metrics) for task in asked[name]),
            *((registry.TASKS[file.config.task], file.config.metrics) for file in files),
        ]:
            task.check_model(manifest.model, str(chosen[name]))
            check_metrics(metrics, task, str(chosen[name]))
        measurements.check_probes(config, manifest, str(chosen[name]))
        if config.harness:
            harness.check_model(manifest.model, str(chosen[name]))
            harness_setups[name] = harness.setup(
                mesh,
                manifest,
                str(chosen[name]),
                seq_len=config.seq_len,
                batch_size=config.batch_size,
                dtype=config.dtype,
            )
        if target:
            acceptance.check(manifest, artifact.read_manifest(target), str(chosen[name]))
            acceptance.check_tasks(asked[name], str(chosen[name]))
    generates = [task.generates for tasks in asked.values() for task in tasks]
    generates += [registry.TASKS[file.config.task].generates for file in files]
    generates += [measurements.probes_generate(config, manifest) for manifest in manifests.values()]
    if measurements.generation_fields(config) and not any(generates):
        given = ", ".join(sorted({task.name for tasks in asked.values() for task in tasks}) or config.tasks)
        raise RequestError(f"generation: not for task {given}; only task seq2seq generates answers")
    judged = identity(artifact.read_manifest(target)) if target else ""
    wanted = {
        name: measurements.of_data(config, mesh, chosen[name], m, asked[name], examples, work, judged)
        for name, m in manifests.items()
    }
    for name, manifest in manifests.items():
        wanted[name] += [measurements.of_file(config, mesh, chosen[name], manifest, file, work) for file in files]
        wanted[name] += measurements.of_probes(config, mesh, chosen[name], manifest, examples, work, training)
    if against:
        measurements.check_comparable(wanted, manifests, against)
        if config.harness and not config.seq_len:
            harness.check_contexts(manifests)
    values = values or bool(against)
    done: dict[str, list[Scored]] = {name: [] for name in chosen}
    timing = _timing(config, mesh) if config.speed else {}
    timed: list[tuple[Measured, Result]] = []
    scoring = 0.0  # seconds
    sizes = {"seq_len": config.seq_len, "dtype": config.dtype}
    with harness.Suite(config.harness, config.lm_eval, config.examples, **sizes) as suite:
        pending: dict[str, tuple[list[Measurement], list[str]]] = {}
        for name, manifest in manifests.items():
            weights = identity(manifest)
            found = [
                before.find(weights, w.definition, timing if w.timed else {}, values and w.compares(manifest.model))
                for w in wanted[name]
            ]
            more = {n: before.find(weights, d) for n, d in suite.definitions.items()}
            done[name] += [_renamed(s, name, manifest) for s in (*found, *more.values()) if s]
            left = [w for w, s in zip(wanted[name], found, strict=True) if not s]
            pending[name] = (left, [n for n, s in more.items() if not s])
            if done[name]:
                say(f"{name}: {len(done[name])} results are there and are kept; --again scores them again")
        due = [name for name, parts in pending.items() if any(parts)]
        judges = [target] if target and any(left for left, _ in pending.values()) else []
        loaded = artifact.load_each([*judges, *(chosen[name] for name in due)], mesh, bases=bases)
        judge = next(loaded) if judges else None
        for name, there in zip(due, loaded, strict=True):
            if any(_generates(one) for one in pending[name][0]) and (line := served.dequantized(there.params)):
                say(f"{name}: {line}")
            for one in pending[name][0]:
                begun = time.perf_counter()
                measured = one.measure(there)
                scoring += time.perf_counter() - begun
                result = _result(name, manifests[name], measured, one)
                if isinstance(one, TaskMeasurement):
                    result["metrics"] |= further(one.config.metrics, measured)
                if judge and isinstance(one, TaskMeasurement) and not one.name:
                    result["metrics"] |= acceptance.measure(one.task, there, judge, one.held, one.setup)
                records = [{"artifact": name, "task": result["record"], **record} for record in measured.written or ()]
                done[name].append(Scored(result, records, measured.values))
                if config.speed and one.timed:  # keeps the weights of all artifacts in memory, to time them in turn
                    timed.append((replace(measured, answers=None, written=None, values={}), result))
                else:
                    before.add(done[name][-1])
                say(f"{name}: {headline(result)}")
            if tasks := pending[name][1]:
                for found in suite.measure(there, harness_setups[name], tasks):
                    done[name].append(_scored(name, manifests[name], found))
                    before.add(done[name][-1])
                    say(f"{name}: {headline(done[name][-1].result)}")
    if timed:
        for _, result in timed:
            result.update(timing)
        say(f"timing {', '.join(chosen)}, in turn, at most {config.repeats} rounds")
        add_times(timed, config, scoring)
    return [scored for found in done.values() for scored in found]


def _renamed(scored: Scored, name: str, manifest: Manifest) -> Scored:
    """Return an earlier result, with the current name and sizes of the artifact. The weights have not changed since
    that result.
    """
    records = [{**record, "artifact": name} for record in scored.records]
    return Scored(scored.result | _about(name, manifest), records, scored.values)


def _scored(name: str, manifest: Manifest, found: harness.HarnessResult) -> Scored:
    """Return the result of a task of the harness, and the value of each metric per document."""
    result = _about(name, manifest) | {"task": found.task, "protocol": found.protocol, "metrics": found.metrics}
    result |= {"definition": found.about["definition"], "record": found.task}
    result["harness"] = {k: v for k, v in found.about.items() if k != "definition"}
    records = [{"artifact": name, "task": found.task, **example} for example in found.examples]
    return Scored(result, records, found.values)


def check_metrics(names: Iterable[str], task: Task, where: str) -> None:
    """Check that the metrics `names` can be computed from the task's true labels and predictions.

    Raises:
        RequestError: If a metric has no function `compute`, or if the task returns no predictions (`Task.answers`).
    """
    for name in names:
        if METRICS[name].compute is None:
            raise RequestError(f"metrics: {name!r} is computed by its task alone; name one that has a function")
        if not task.answers:
            raise RequestError(f"{where}: metrics: {task.title} has no answers to compute {name!r} from")


def further(names: Iterable[str], measured: Measured) -> dict[str, float]:
    """Compute the metrics `names`, which the user requested in addition to the metrics of the task.

    Call `check_metrics` first.
    """
    found: dict[str, float] = {}
    for name in names:
        compute = METRICS[name].compute
        assert compute is not None and measured.answers is not None
        found[name] = float(compute(*measured.answers))
    return found


def _about(name: str, manifest: Manifest) -> Result:
    fields = ("stage", "family", "parameters", "weight_bytes", "bytes", "sparsity", "bits")
    beside = {name: getattr(manifest, name) for name in fields}
    return {"artifact": name, "digest": manifest.digest, "content": manifest.content, **beside}


def _result(name: str, manifest: Manifest, measured: Measured, work: Measurement) -> Result:
    file = work.name if isinstance(work, TaskMeasurement) else ""
    protocol = f"{measured.task}, {measured.protocol}" if file else measured.protocol
    scored = {"task": file or measured.task, "protocol": protocol, "metrics": dict(measured.metrics)}
    return _about(name, manifest) | scored | {"definition": work.definition, "record": work.label}


def _generates(work: Measurement) -> bool:
    return isinstance(work, TaskMeasurement) and work.task.generates


def _timing(config: MeasureConfig, mesh: Mesh) -> dict[str, Any]:
    """Return the fields of a result that describe how times are measured: devices, batch size and rounds."""
    kinds = Counter(d.device_kind for d in mesh.devices.flat)
    devices = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    return {"timed_on": devices, "timed_batch": config.batch_size, "timed_rounds": config.repeats}


def add_times(timed: Sequence[tuple[Measured, Result]], config: MeasureConfig, seconds: float = math.inf) -> None:
    """Time all programs, and add latency (batch 1, in seconds) and throughput to the metrics of their results.

    Args:
        timed: Pairs of a measurement and its result.
        config: Settings of the evaluation.
        seconds: Time after which no further round begins (see `speed.interleave`).
    """
    single, batched = (
        speed.interleave(
            {str(i): run for i, (p, _) in enumerate(timed) if (run := getattr(p, name))}, config.repeats,
            seconds=seconds / 2,
        )
        for name in ("single", "batched")
    )  # fmt: skip
    for i, (program, result) in enumerate(timed):
        result["metrics"] |= {
            "latency_p50": single[str(i)].p50,
            "latency_p90": single[str(i)].p90,
            **{rate: batched[str(i)].rate(units) for rate, units in program.units.items()},
        }
