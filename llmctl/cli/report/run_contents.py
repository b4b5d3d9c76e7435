"""Read the files that the stages of a run wrote: manifests, logs, results of evaluations, predictions and attributions.

JAX is not imported. Arrays are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from llmctl.artifacts.manifest import NAME, Manifest
from llmctl.artifacts.manifest_file import read_manifest
from llmctl.cli import summary
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json

LOG, RECORDS = "log.jsonl", "predictions.jsonl"
ATTRIBUTIONS = "*.attributions.json"
"""Name pattern of the files that `llmctl explain --json` wrote into a run's folder."""
WORK = ".work"
"""Folder in a run with the temporary files of stages that have not finished."""
MOST_RECORDS = 200_000
"""Maximum number of lines to read from each file with predictions."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Store one model of the run."""

    name: str
    manifest: Manifest
    summary: Record
    """Entry of the model in the output of `llmctl show --json`."""
    log: list[Record]
    """Lines of the training log, or of the log of a calibration walk; empty if there are none."""


@dataclass(frozen=True)
class Evaluation:
    """Store the results of one `eval` stage."""

    name: str
    manifest: Manifest
    results: list[Record]
    comparisons: list[Record]
    records: list[Record]
    """Lines of predictions.jsonl: one record per example, with the keys "artifact" and "task"."""


@dataclass(frozen=True)
class Unfinished:
    """Store the name of an interrupted or failed stage, and the log in its temporary folder."""

    name: str
    log: list[Record]


@dataclass(frozen=True)
class Contents:
    """Store the contents of a run, or of a single artifact."""

    folder: str
    """Name of the folder of the run or artifact, without its parent folders."""
    summary: Record
    """Output of `llmctl show --json` for a run: {"artifacts": [...], "reports": [...]}."""
    models: list[Model]
    evaluations: list[Evaluation]
    unfinished: list[Unfinished] = field(default_factory=list)
    attributions: list[Record] = field(default_factory=list)
    """Records of token attributions for models of the run, one per file."""
    single: bool = False
    """Whether the folder is one artifact and not a run."""


def read(folder: Path, is_attribution: Callable[[Record], bool] = lambda _: True) -> Contents:
    """Read the run in `folder`. If the folder is an artifact, read this artifact and the evaluations next to it.

    Args:
        folder: Folder of a run, or of an artifact.
        is_attribution: Function that returns whether an object is a valid record of attributions.

    Raises:
        RequestError: If the folder has no artifact, or if a file is damaged. The message names the file.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    if (folder / NAME).exists():
        return replace(
            found := _single(folder), attributions=_attributions(folder.resolve().parent, found, is_attribution)
        )
    found = summary.run(folder)
    names = _artifacts(folder)
    manifests = {name: read_manifest(folder / name) for name in names}
    named = {(m.name, m.digest): name for name, m in manifests.items() if m.weights}
    places = [(named[entry["name"], entry["digest"]], entry) for entry in found["artifacts"]]
    models = [_model(folder / name, manifests[name], entry) for name, entry in places]
    known: dict[str, list[str]] = {}
    for m in manifests.values():
        if m.weights:
            known.setdefault(m.content or m.digest, []).append(m.name)
    measured = [(folder / name, manifests[name]) for name in names if not manifests[name].weights]
    evaluations = [_evaluation(place, manifest, known) for place, manifest in measured]
    made = Contents(folder.resolve().name, found, models, evaluations, _unfinished(folder, names))
    return replace(made, attributions=_attributions(folder, made, is_attribution))


def _single(folder: Path) -> Contents:
    """Read one artifact. Results of evaluations next to it are used if they measured the same weights."""
    manifest = read_manifest(folder)
    entry = summary.one(folder)
    if not manifest.weights:
        evaluation = _evaluation(folder, manifest, {})
        shown = {"artifacts": [], "reports": summary.results(folder)}
        return Contents(folder.resolve().name, shown, [], [evaluation], single=True)
    keys = summary.entry(manifest).keys()
    shown = {"artifacts": [{key: entry[key] for key in keys}], "reports": []}
    model = _model(folder, manifest, shown["artifacts"][0])
    return Contents(folder.resolve().name, shown, [model], [], single=True)


def _artifacts(folder: Path) -> list[str]:
    """Return the names of the folders in a run that are artifacts. Names that begin with a dot are temporary."""
    return sorted(p.parent.name for p in folder.glob(f"*/{NAME}") if not p.parent.name.startswith("."))


def _model(folder: Path, manifest: Manifest, entry: Record) -> Model:
    return Model(manifest.name, manifest, entry, lines(folder / LOG))


def _evaluation(folder: Path, manifest: Manifest, known: Mapping[str, Sequence[str]]) -> Evaluation:
    """Read the results of an evaluation. A model of the run is named by its name in the run, not by the path given in
    `--of`.

    Args:
        folder: Folder of the evaluation.
        manifest: Manifest of the evaluation.
        known: Names of the models of the run by content digest; copies of a model have one digest.
    """
    results = summary.complete_results(folder)
    names = {}
    for r in results:
        name, same = r["artifact"], known.get(r.get("content") or r["digest"], [])
        names[name] = name if name in same or not same else same[0]
    if len(set(names.values())) < len(names):  # copies of one model were measured
        names = {}

    def renamed(records: list[Record], *keys: str) -> list[Record]:
        return [{**r, **{key: names.get(r[key], r[key]) for key in keys}} for r in records]

    return Evaluation(
        manifest.name,
        manifest,
        renamed(results, "artifact"),
        renamed(summary.comparisons(folder), "artifact", "against"),
        renamed(lines(folder / RECORDS, _has("artifact", "task"), MOST_RECORDS), "artifact"),
    )


def _unfinished(folder: Path, finished: Sequence[str]) -> list[Unfinished]:
    """Return the stages that have a temporary folder and no artifact."""
    work = folder / WORK
    names = sorted(p.name for p in work.iterdir() if p.is_dir()) if work.is_dir() else []
    return [Unfinished(name, lines(work / name / LOG)) for name in names if name not in finished]


def _attributions(folder: Path, of: Contents, valid: Callable[[Record], bool]) -> list[Record]:
    """Return the records of token attributions in a folder, one per file. Records of models outside `of` are omitted.

    Raises:
        RequestError: If a file is damaged.
    """
    found: list[Record] = []
    for file in sorted(folder.glob(ATTRIBUTIONS)):
        try:
            value = parse_json(file.read_bytes())
            if not isinstance(value, dict) or not valid(value):
                raise ValueError("no attributions")
        except (ValueError, TypeError, AttributeError) as e:
            raise RequestError(f"{file}: damaged ({e}); write it again with llmctl explain --json") from None
        found.append(value)
    return [value for value in found if value["digest"] in {model.manifest.digest for model in of.models}]


def _has(*keys: str) -> Callable[[Record], bool]:
    return lambda record: all(isinstance(record.get(key), str) for key in keys)


def lines(file: Path, valid: Callable[[Record], bool] = lambda _: True, most: int | None = None) -> list[Record]:
    """Return the objects of a file with one JSON object per line; an empty list if there is no file.

    An incomplete last line, which a killed process may leave, is omitted. If `most` is given, the lines after the first
    `most` are not read.

    Raises:
        RequestError: If another line is no valid object. The message names the file and the line.
    """
    if not file.is_file():
        return []
    found: list[Record] = []
    with file.open("rb") as stream:
        for n, line in enumerate(islice(stream, most), 1):
            if not line.endswith(b"\n"):
                break
            try:
                value = parse_json(line)
                if not isinstance(value, dict) or not valid(value):
                    raise ValueError("not a record")
            except ValueError as e:
                raise RequestError(f"{file}: line {n}: damaged ({e}); run the stage that made it again") from None
            found.append(value)
    return found
