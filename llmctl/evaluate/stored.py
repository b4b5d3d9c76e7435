"""Find results of earlier evaluations, so that no artifact is scored twice on the same task.

A result is found by two digests. The first digest covers the weights, and everything else in the artifact that can
change predictions. The second digest covers the definition of the task: data, prompts, metrics and protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.artifacts.manifest import Manifest
from llmctl.distributed import processes
from llmctl.evaluate.report import Result

RESULTS, RECORDS = "results.json", "predictions.jsonl"
"""Names of the files of an evaluation: the results, and the records about examples."""
PARTIAL = "scored.jsonl"
"""Name of a file in the stage's temporary folder. The file contains the results so far."""


@dataclass(frozen=True)
class Scored:
    """Store one result, and the result's records about examples."""

    result: Result
    records: list[dict[str, Any]] = field(default_factory=list)


class Stored:
    """Find the results of earlier evaluations, and save new results before the evaluation ends.

    Example:
        >>> Stored([]).find("a digest", "another", timed=False) is None
        True
    """

    def __init__(self, found: Sequence[Scored], partial: Path | None = None) -> None:
        """Store earlier results, and the path of the file to which `add` appends results."""
        self._found = {(identity(s.result), s.result["definition"]): s for s in found if "definition" in s.result}
        self._partial = partial

    def find(self, weights: str, definition: str, timed: bool) -> Scored | None:
        """Return the result of an artifact on a task. If there is no such result, return None.

        Args:
            weights: Digest of the artifact (see `identity`).
            definition: Digest of the task.
            timed: Whether the result must have times. If false, a result with times is also returned.
        """
        scored = self._found.get((weights, definition))
        return scored if scored is not None and (not timed or "timed_on" in scored.result) else None

    def add(self, scored: Scored) -> None:
        """Append a new result to the file of the interrupted evaluation."""
        if self._partial is not None and processes.first():
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            with self._partial.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([scored.result, scored.records], ensure_ascii=False) + "\n")


def identity(of: Result | Manifest) -> str:
    """Return the digest of everything in an artifact that can change predictions.

    If an earlier version of llmctl saved the artifact, the digest covers only the weights.
    """
    content, digest = (of["content"], of["digest"]) if isinstance(of, dict) else (of.content, of.digest)
    return content or digest


def digest(*parts: Any) -> str:
    """Return the digest of a definition that consists of JSON data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read(folder: Path, work: Path) -> Stored:
    """Return the results in the folder of an evaluation, and the results that an interruption left in `work`.

    Files that cannot be read count as missing, because the results can be computed again.
    """
    partial = work / PARTIAL

    def saved() -> list[list[Any]]:
        results = _parsed(lambda: json.loads((folder / RESULTS).read_text(encoding="utf-8")))
        records = _parsed(lambda: _lines(folder / RECORDS))
        mine = [[r, [x for x in records if _belongs(x, r)]] for r in results if isinstance(r, dict)]
        return [*mine, *_parsed(lambda: _lines(partial))]

    pairs = processes.broadcast(saved)
    return Stored([Scored(result, records) for result, records in pairs], partial)


def _belongs(record: dict[str, Any], result: Result) -> bool:
    return (record.get("artifact"), record.get("task")) == (result.get("artifact"), result.get("record", ""))


def _parsed(read: Callable[[], Any]) -> list[Any]:
    try:
        found = read()
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _lines(file: Path) -> list[Any]:
    """Return the values of a file with one JSON value per line. An incomplete last line is omitted."""
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
