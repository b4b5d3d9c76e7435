"""Find held-out examples that share an n-gram with training text, and measure a task without them.

An example is contaminated if one of its n-grams occurs in the training text (Brown et al., 2020, arXiv:2005.14165,
appendix C; see `llmctl.evaluate.harm.ngrams`). The task is measured once on all examples. Its metrics on the clean and
on the contaminated examples are computed from the values per example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.artifacts.manifest import Manifest
from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import TEXT_COLUMNS
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.evaluate import task_files
from llmctl.evaluate.harm import ngrams
from llmctl.evaluate.harm.settings import ContaminationConfig
from llmctl.evaluate.metrics.base import METRICS
from llmctl.evaluate.metrics.classification import wilson_interval
from llmctl.evaluate.metrics.resampling import estimators, interval, resamples
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.registry import TASKS, of

RESAMPLES = 1000
"""Number of bootstrap resamples for the intervals of metrics on clean examples."""


def check(manifest: Manifest, settings: ContaminationConfig, where: str) -> None:
    """Check that the tasks of the task files suit the model.

    Raises:
        RequestError: If a task does not suit the model, or if a task file is invalid.
    """
    for file in settings.task_files:
        TASKS[task_files.read(file).task].check_model(manifest.model, where)


def definition(settings: ContaminationConfig) -> Any:
    """Return the settings, and the digests of the task files and of the training text that the settings name."""
    files = [task_files.load(file).digest for file in settings.task_files]
    corpus = _corpus(settings).digest if settings.corpus else ""
    return [settings.ngram, settings.shortest, files, corpus]


def measure(title: str, artifact: Artifact, held: Held, setup: Setup, settings: ContaminationConfig) -> Measured:
    """Search the training text for n-grams of the examples.

    Then measure the artifact's task on all, on the clean and on the contaminated examples.

    Args:
        title: Title of the result.
        artifact: The artifact.
        held: Held-out examples, and the train split of the same data.
        setup: Settings of the measurement.
        settings: Settings of the probe.

    Raises:
        RequestError: If the train split is measured, or if no example is long enough.
    """
    if not settings.corpus and (held.split == "train" or held.training is None):
        raise RequestError("contamination: the train split is searched for a held-out split; set split to test")
    training = _corpus(settings) if settings.corpus else held.training
    assert training is not None
    files = {Path(file).stem: task_files.load(file) for file in settings.task_files}
    texts = {"": [_text(row) for row in held.examples]} | {
        name: [_text(row) for row in file.examples] for name, file in files.items()
    }
    shared = _shared(texts, (_text(row) for row in training), settings)
    metrics, values, records = _measured(artifact, of(artifact.manifest), held, setup, texts[""], shared[""], settings)
    for name, file in files.items():
        given = "generation" in file.config.model_fields_set
        generation = file.config.generation if given else setup.generation
        own = replace(setup, seq_len=file.config.seq_len or setup.seq_len, generation=generation)
        there = Held(file.examples, file.config.split, held.folder / name)
        task = TASKS[file.config.task]
        found = _measured(artifact, task, there, own, texts[name], shared[name], settings)
        metrics.setdefault("task_files", {})[name] = found[0]
        records += [{"task_file": name, **record} for record in found[2]]
    searched = f"{len(training):,} documents of {'contamination.corpus' if settings.corpus else 'the train split'}"
    protocol = (
        f"{held.split} split, {len(held.examples)} examples, {settings.ngram}-grams of words, shorter examples of at "
        f"least {min(settings.shortest, settings.ngram)} words whole, in {searched}, {setup.dtype}"
    )
    return Measured(title, protocol, metrics, written=records, values=values)


def on_part(values: dict[str, np.ndarray], part_N: np.ndarray, names: Iterable[str], seed: int = 0) -> dict[str, float]:
    """Return metrics on a part of the examples, with 95 % bootstrap intervals.

    Args:
        values: Values per example of a task (see `llmctl.evaluate.metrics.resampling.Values`).
        part_N: Whether an example belongs to the part.
        names: Names of the metrics.
        seed: Seed of the bootstrap.
    """
    if not part_N.any():
        return {}
    own = {name: np.asarray(a)[part_N] for name, a in values.items()}
    count, metrics = int(part_N.sum()), dict[str, float]()
    known = estimators(own)
    for name in (name for name in names if name in known):
        (value,) = known[name](np.ones((1, count)))
        sampled = np.concatenate([known[name](count_RN) for count_RN in resamples(count, RESAMPLES, seed)])
        low, high = interval(sampled)
        if all(map(math.isfinite, (value, low, high))):
            metrics |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
    return metrics


def _measured(
    artifact: Artifact,
    task: Task,
    held: Held,
    setup: Setup,
    texts: Sequence[str],
    shared: Sequence[ngrams.Shared | None],
    settings: ContaminationConfig,
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[dict[str, Any]]]:
    """Measure a task, and return metrics, values per example and a record per contaminated example."""
    judged_N = np.array(ngrams.sizes(texts, settings.ngram, settings.shortest)) > 0
    hit_N = np.array([one is not None for one in shared])
    if not judged_N.any():
        raise RequestError(
            f"contamination: no example has {min(settings.shortest, settings.ngram)} words; lower "
            "contamination.shortest"
        )
    measured = task.evaluate(artifact, held, setup)
    low, high = wilson_interval(int(hit_N.sum()), int(judged_N.sum()))
    metrics: dict[str, Any] = {"contaminated": float(hit_N.sum() / judged_N.sum())}
    metrics |= {"contaminated_low": low, "contaminated_high": high}
    metrics |= {"judged_examples": int(judged_N.sum()), "short_examples": int((~judged_N).sum())}
    parts = {"all": np.ones_like(hit_N), "clean": judged_N & ~hit_N, "contaminated": hit_N}
    metrics["parts"] = {name: on_part(measured.values, part_N, measured.metrics) for name, part_N in parts.items()}
    clean = metrics["parts"]["clean"]
    for name in (name for name in clean if f"clean_{name}" in METRICS):
        metrics |= {f"clean_{name}{end}": clean[f"{name}{end}"] for end in ("", "_low", "_high")}
    records = []
    for i in np.flatnonzero(hit_N).tolist():
        where, one = held.examples.source.where(int(held.examples.index[i])), shared[i]
        assert one is not None
        records.append({"row": where, "ngram": " ".join(one.words), "document": one.document})
    return metrics, {"contaminated": hit_N[judged_N]}, records


def _shared(
    texts: dict[str, list[str]], training: Iterator[str], settings: ContaminationConfig
) -> dict[str, list[ngrams.Shared | None]]:
    """Search the training text once for the texts of all sets of examples. Return the shared n-grams per set."""
    every = [text for some in texts.values() for text in some]
    found = iter(ngrams.find_shared(every, training, ngram=settings.ngram, shortest=settings.shortest))
    return {name: [next(found) for _ in some] for name, some in texts.items()}


def _text(row: Row) -> str:
    """Return the texts of a row, one per line. Choices, words and messages are texts too."""
    texts = [row[column] for column in TEXT_COLUMNS if column in row]
    texts += list(row.get("choices", ()))
    if "tokens" in row and not texts:
        texts = [" ".join(map(str, row["tokens"]))]
    texts += [str(message.get("content") or "") for message in row.get("messages", ())]
    return "\n".join(map(str, texts))


def _corpus(settings: ContaminationConfig) -> Examples:
    """Return the train split of the data in the setting `corpus`.

    Raises:
        RequestError: If the data is missing or invalid.
    """
    assert settings.corpus is not None
    return splits.load(settings.corpus, labels=False)["train"]
