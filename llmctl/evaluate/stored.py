"""Find results of earlier evaluations, so that no artifact is scored twice on the same task.

A result is found by two digests. The first digest covers the weights, and everything else in the artifact that can
change predictions. The second digest covers the definition of the task: data, prompts, metrics and protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.artifacts.manifest import Manifest
from llmctl.data.config import TEXT_COLUMNS
from llmctl.distributed import processes
from llmctl.evaluate.report import Result
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Held, Setup
from llmctl.evaluate.tasks.base import Task

RESULTS, RECORDS, VALUES = "results.json", "predictions.jsonl", "example_values.jsonl"
"""Names of the files of an evaluation: the results, the records about examples, and the values per example."""
PARTIAL = "scored.jsonl"
"""Name of a file in the stage's temporary folder, with the results so far of an evaluation that has not ended."""


@dataclass(frozen=True)
class Scored:
    """Store one result, the result's records about examples, and its values per example."""

    result: Result
    records: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Values per example (see `llmctl.evaluate.metrics.resampling.Values`); empty if the task has none."""


class Stored:
    """Find the results of earlier evaluations, and save new results before the evaluation ends.

    Example:
        >>> Stored([]).find("a digest", "another") is None
        True
    """

    def __init__(self, found: Sequence[Scored], partial: Path | None = None) -> None:
        """Store earlier results, and the path of the file to which `add` appends results."""
        self._found = {(identity(s.result), s.result["definition"]): s for s in found if "definition" in s.result}
        self._partial = partial

    def find(
        self, weights: str, definition: str, timing: Mapping[str, Any] | None = None, values: bool = False
    ) -> Scored | None:
        """Return the result of an artifact on a task. If there is no such result, return None.

        Args:
            weights: Digest of the artifact (see `identity`).
            definition: Digest of the task.
            timing: Fields that describe how times are measured. A result whose fields differ, or that has no times,
                counts as missing. If None or empty, every result is accepted.
            values: Whether a result without values per example counts as missing.
        """
        scored = self._found.get((weights, definition))
        if scored is None or (values and not scored.values):
            return None
        return scored if all(scored.result.get(key) == value for key, value in (timing or {}).items()) else None

    def add(self, scored: Scored) -> None:
        """Append a new result to the file from which an interrupted evaluation continues."""
        if self._partial is not None and processes.first():
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            with self._partial.open("a", encoding="utf-8") as stream:
                parts = [scored.result, scored.records, listed(scored.values)]
                stream.write(json.dumps(parts, ensure_ascii=False) + "\n")


def listed(values: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """Return values per example as JSON data. Booleans become 0 and 1, which take less space."""
    return {k: (a.astype(np.int8) if a.dtype == bool else a).tolist() for k, a in values.items()}


def write(scored: Sequence[Scored], folder: Path) -> None:
    """Write the results, their records and their values per example into a folder. Empty files are not written."""
    text = json.dumps([s.result for s in scored], indent=1, ensure_ascii=False, allow_nan=False)
    (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    values = [{**_owner(s.result), "values": listed(s.values)} for s in scored if s.values]
    for name, lines in ((RECORDS, [record for s in scored for record in s.records]), (VALUES, values)):
        if lines:
            written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / name).write_text(written, encoding="utf-8")


def identity(of: Result | Manifest) -> str:
    """Return the digest of everything in an artifact that can change predictions.

    If an earlier version of llmctl saved the artifact, the digest covers only the weights.
    """
    content, digest = (of["content"], of["digest"]) if isinstance(of, dict) else (of.content, of.digest)
    return content or digest


def digest(*parts: Any) -> str:
    """Return the digest of a definition that consists of JSON data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def definition(config: MeasureConfig, task: Task, held: Held, setup: Setup, target: str = "") -> str:
    """Return the digest of a measurement: the task, the texts and labels of the examples, and the settings.

    The labels include all columns without texts, such as the answers to questions and the labels of words. Two
    measurements with equal weights and equal digests have equal results.
    """
    *data, settings = conditions(held, setup)
    settings |= {"generation": setup.generation.model_dump()} if task.generates else {}
    return digest(task.name, *data, settings, list(config.metrics), target)


def conditions(held: Held | None, setup: Setup) -> list[Any]:
    """Return the parts of a definition that tasks and probes share: split, texts, labels, and settings by name.

    The settings of generation are omitted.
    """
    settings = {k: v for k, v in vars(setup).items() if k not in ("mesh", "batch_size", "generation")}
    if held is None:
        return [settings]
    examples = held.examples
    answers = hashlib.sha256(repr((examples.classes, examples.columns)).encode())
    if examples.labels is not None:
        answers.update(examples.labels.tobytes())
    if columns := [c for c in examples.columns if c not in (*TEXT_COLUMNS, "label")]:
        for row in examples:
            answers.update(repr([row.get(column) for column in columns]).encode())
    return [held.split, examples.digest, answers.hexdigest(), settings]


def read(folder: Path, work: Path) -> Stored:
    """Return the results in the folder of an evaluation, and the results that an interruption left in `work`.

    Files that cannot be read count as missing, because the results can be computed again.
    """
    partial = work / PARTIAL

    def saved() -> list[list[Any]]:
        results = _parsed(lambda: json.loads((folder / RESULTS).read_text(encoding="utf-8")))
        records = _parsed(lambda: _lines(folder / RECORDS))
        values = _parsed(lambda: _lines(folder / VALUES))
        mine = [
            [r, [x for x in records if _belongs(x, r)], *(x["values"] for x in values if _belongs(x, r))]
            for r in results
            if isinstance(r, dict)
        ]
        return [*mine, *_parsed(lambda: _lines(partial))]

    found = []
    for result, records, *values in processes.broadcast(saved):
        found.append(Scored(result, records, {k: np.array(v) for part in values for k, v in part.items()}))
    return Stored(found, partial)


def _owner(result: Result) -> dict[str, str]:
    """Return the fields that a result shares with its records and values."""
    return {"artifact": result.get("artifact", ""), "task": result.get("record", "")}


def _belongs(record: dict[str, Any], result: Result) -> bool:
    return all(record.get(key) == value for key, value in _owner(result).items())


def _parsed(read: Callable[[], Any]) -> list[Any]:
    try:
        found = read()
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _lines(file: Path) -> list[Any]:
    """Return the values of a file with one JSON value per line. An incomplete last line is omitted."""
    lines = file.read_text(encoding="utf-8").split("\n")  # a text may contain other characters that end a line
    return [json.loads(line) for line in lines[:-1]]
