"""Measure a task on changed texts: its metric under each change, and the fraction of predictions that change.

All changes share one compiled program, because the rows of changed texts have the shapes of the original rows.

Shapes: N examples, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data.changed_source import ChangedSource
from llmctl.data.source import Row, Source
from llmctl.data.splits import Examples
from llmctl.evaluate.metrics.base import UNDER
from llmctl.evaluate.metrics.resampling import Values
from llmctl.evaluate.robustness import summary, synonyms
from llmctl.evaluate.robustness.perturbations import Options, changed
from llmctl.evaluate.robustness.settings import RobustnessConfig
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks.base import Task


class ChangedTexts(ChangedSource):
    """Change the texts of some columns when rows are read. Missing columns are skipped."""

    def __init__(self, source: Source, columns: tuple[str, ...], change: str, options: Options, seed: int) -> None:
        super().__init__(source)
        self._of, self._change, self._options, self._seed = columns, change, options, seed

    def changed(self, row: Row) -> Row:
        """Return the changed texts of a row."""
        return {c: changed(self._change, row[c], self._options, self._seed) for c in self._of if c in row}


def measure(task: Task, artifact: Artifact, held: Held, setup: Setup, settings: RobustnessConfig) -> Measured:
    """Measure the task on the original texts, and on the texts after each change of the settings."""
    task.check_examples(artifact, held.examples)
    options = Options(settings.rate, synonyms.read(settings.synonyms), settings.templates, settings.neutral)
    step = task.measuring_step(artifact.model, setup.dtype)
    rows, scores = task.scored(artifact, held.examples, setup, step, held.corpus)
    clean = scores.values
    name, values_N = main_values(task, artifact, clean)
    values, written = {name: values_N}, []
    for change in settings.changes:
        source = ChangedTexts(held.examples.source, task.perturbs, change, options, settings.seed)
        examples = replace(held.examples, source=source)
        found = task.scored(artifact, examples, setup, step)[1].values
        values[name + UNDER + change] = main_values(task, artifact, found)[1]
        apart_N = moved(clean["prediction"], found["prediction"])
        values[f"{'flips' if apart_N.dtype == bool else 'shift'}{UNDER}{change}"] = apart_N
        values[f"changed{UNDER}{change}"] = np.array(
            [any(a[c] != b[c] for c in task.perturbs if c in a) for a, b in zip(held.examples, examples, strict=True)]
        )
        for i in np.argsort(-apart_N.astype(np.float64), kind="stable")[: settings.records]:
            if apart_N[i]:
                of = [named(side["prediction"][i], artifact.manifest.labels) for side in (clean, found)]
                written.append(record(task, held.examples, examples, int(i), change, *of))
    protocol = (
        f"{task.protocol(artifact, held, setup, rows, scores.metrics)}, rate {settings.rate:g}, seed {settings.seed}"
    )
    return Measured(
        "robustness", protocol, summary.with_intervals(values, settings.seed), written=written, values=values
    )


def main_values(task: Task, artifact: Artifact, values: Values) -> tuple[str, np.ndarray]:
    """Return the name of a task's main metric, and its values per example.

    If the metric that selects the best checkpoint is a mean or a ratio, it is the main metric. For regression, the main
    metric is the mean absolute error.
    """
    name = task.best(artifact.manifest.labels)
    if name in values:
        return name, np.asarray(values[name])
    return "mae", np.abs(np.float64(values["prediction"]) - np.float64(values["label"]))


def moved(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return whether each prediction changed, bool [N]; for predicted numbers, the absolute change, float [N].

    Example:
        >>> moved(np.array([0, 1]), np.array([1, 1])).tolist(), moved(np.array([0.5]), np.array([2.0])).tolist()
        ([True, False], [1.5])
    """
    if np.issubdtype(before.dtype, np.floating):
        return np.abs(np.float64(after) - np.float64(before))
    return (before != after).reshape(len(before), -1).any(1)


def named(prediction: Any, labels: list[str]) -> Any:
    """Return a prediction as JSON data: a class name, the names of a set of classes, or a number."""
    if np.ndim(prediction):
        return [name for name, there in zip(labels, prediction, strict=True) if there]
    return labels[int(prediction)] if labels else prediction.item()


def record(task: Task, before: Examples, after: Examples, i: int, change: str, old: Any, new: Any) -> dict[str, Any]:
    """Return a record of one example whose prediction changed: its row, its changed texts and both predictions."""
    texts = {column: after[i][column] for column in task.perturbs if column in after[i]}
    about = {"row": before.source.where(int(before.index[i])), "change": change, **texts}
    return about | {"prediction": new, "original_prediction": old}
