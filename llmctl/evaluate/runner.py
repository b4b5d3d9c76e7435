"""Evaluate artifacts: compute the metrics of each artifact, then time all artifacts in alternation."""

from __future__ import annotations

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
from llmctl.evaluate import acceptance, speed
from llmctl.evaluate.metrics.base import METRICS
from llmctl.evaluate.report import Result, headline
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks import registry
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.settings import GenerationConfig


def results(
    config: MeasureConfig,
    chosen: Mapping[str, Path],
    examples: Examples,
    mesh: Mesh,
    work: Path,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
    bases: Sequence[Path] = (),
    target: Path | None = None,
) -> list[Result]:
    """Measure artifacts on held-out examples, and time them if `config.speed` is set.

    Args:
        config: Tasks, metrics, batch size and speed settings.
        chosen: Folder of each artifact, by name.
        examples: Held-out examples.
        mesh: The device mesh.
        work: Folder for tokenized examples.
        say: Function that is called with one line of text per result.
        keep: Function that is called with each record about an example, such as a wrong prediction or a generated text.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.
        target: Folder of a language model for which the artifacts are drafts (see `llmctl.evaluate.acceptance`).

    Returns:
        One result per artifact and task (see `llmctl.evaluate.report`).

    Raises:
        RequestError: If an artifact cannot be measured. All artifacts are checked before the first measurement.
    """
    manifests = {name: artifact.read_manifest(path) for name, path in chosen.items()}
    asked = {name: [registry.TASKS[t] for t in config.tasks] or [registry.of(m)] for name, m in manifests.items()}
    for name, manifest in manifests.items():
        for task in asked[name]:
            task.check_model(manifest.model, str(chosen[name]))
            check_metrics(config.metrics, task, str(chosen[name]))
        if target:
            acceptance.check(manifest, artifact.read_manifest(target), str(chosen[name]))
    if _set(config) and not any(task.generates for tasks in asked.values() for task in tasks):
        given = ", ".join(sorted({task.name for tasks in asked.values() for task in tasks}))
        raise RequestError(f"generation: not for task {given}; only task seq2seq generates answers")
    setups = {name: setup(config, mesh, chosen[name], m) for name, m in manifests.items()}
    held = Held(examples, config.split, work)
    out: list[Result] = []
    programs: dict[str, Measured] = {}
    loaded = artifact.load_each([*([target] if target else []), *chosen.values()], mesh, bases=bases)
    judge = next(loaded) if target else None
    for name, there in zip(chosen, loaded, strict=True):
        for task in asked[name]:
            measured = task.evaluate(there, held, setups[name])
            out.append(_result(name, manifests[name], measured))
            out[-1]["metrics"] |= further(config.metrics, measured)
            if judge:
                out[-1]["metrics"] |= acceptance.measure(task, there, judge, held, setups[name])
            for record in measured.written or ():
                keep({"artifact": name, "task": task.name, **record})
            measured = replace(measured, answers=None, written=None)
            if config.speed:  # this keeps the weights of all artifacts in memory, because they are timed in alternation
                programs[str(len(programs))] = measured
            say(f"{name}: {headline(out[-1])}")
    if programs:
        kinds = Counter(d.device_kind for d in mesh.devices.flat)
        for result in out:
            result["timed_on"] = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
        say(f"timing {', '.join(chosen)}, in turn, {config.repeats} rounds")
        _time(programs, out, config)
    return out


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


def _result(name: str, manifest: Manifest, measured: Measured) -> Result:
    about = ("stage", "family", "parameters", "weight_bytes", "bytes", "sparsity", "bits")
    beside = {name: getattr(manifest, name) for name in about}
    scored = {"task": measured.task, "protocol": measured.protocol, "metrics": dict(measured.metrics)}
    return {"artifact": name, "digest": manifest.digest, "content": manifest.content, **scored, **beside}


def _time(programs: Mapping[str, Measured], out: Iterable[Result], config: MeasureConfig) -> None:
    """Time all programs, and add latency (batch 1, in seconds) and throughput to the metrics of the results `out`.

    `programs` and `out` have the same order.
    """
    single = speed.interleave({n: p.single for n, p in programs.items()}, config.repeats)
    batched = speed.interleave({n: p.batched for n, p in programs.items()}, config.repeats)
    for name, result in zip(programs, out, strict=True):
        result["metrics"] |= {
            "latency_p50": single[name].p50,
            "latency_p90": single[name].p90,
            **{rate: batched[name].rate(units) for rate, units in programs[name].units.items()},
        }


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
    given = {name: getattr(config.generation, name) for name in _set(config)}
    return GenerationConfig.of(artifact.generation_settings(manifest) | given)


def _set(config: MeasureConfig) -> set[str]:
    """Return the names of the settings in `config.generation` that the user set."""
    return config.generation.model_fields_set if "generation" in config.model_fields_set else set()
