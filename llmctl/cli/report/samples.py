"""Show predictions on the same examples side by side, one column per model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from llmctl.cli.report import figures
from llmctl.cli.report.document import Block, Cell, Folded, Paragraph, Section, Table, cell
from llmctl.cli.report.run_contents import Contents, Record

KEYS = ("row", "doc_id", "id", "prompt", "question", "text")
"""Fields that identify an example. The first of these fields that all records of a task have is used."""
ALSO = ("change", "attack")
"""Optional fields that identify a changed version of an example, such as the name of an attack."""
SHOWN = 12
"""Maximum number of examples per task."""
LONGEST = 700
"""Maximum number of characters per text."""
OWN = ("artifact", "task")


def section(contents: Contents) -> Section:
    """Return the section with samples of all evaluations."""
    parts: list[Block] = []
    for evaluation in contents.evaluations:
        for task in dict.fromkeys(r["task"] for r in evaluation.records):
            records = [r for r in evaluation.records if r["task"] == task]
            models = dict.fromkeys(r["artifact"] for r in evaluation.results)
            parts += _task(task, records, [m for m in models if any(r["artifact"] == m for r in records)])
    text = "Some evaluations write records of wrong predictions only."
    text += " A dash means that a model has no record of the example."
    return Section("Samples", [Paragraph(text), *parts] if parts else [Paragraph("No evaluation wrote predictions.")])


def _task(task: str, records: Sequence[Record], models: Sequence[str]) -> list[Block]:
    key = next((k for k in KEYS if all(k in r for r in records)), "")
    groups: dict[str, dict[str, Record]] = {}
    for i, r in enumerate(records):
        same = json.dumps([r[k] for k in (key, *ALSO) if k in r]) if key else str(i)
        groups.setdefault(same, {}).setdefault(r["artifact"], r)
    chosen = sorted(groups.values(), key=lambda group: -len(group))[:SHOWN]
    if not chosen:
        return []
    rows = []
    for group in chosen:
        first = next(iter(group.values()))
        shared = [k for k in first if k not in OWN and all(k in r and r[k] == first[k] for r in group.values())]
        if len(group) == 1:  # the output of a single model is not shared by all models
            shared = [k for k in shared if not _is_output(k)]
        mine = [
            _cell({k: v for k, v in group[m].items() if k not in (*OWN, *shared)}) if m in group else cell("–")
            for m in models
        ]
        rows.append([_cell({k: first[k] for k in shared}), *mine])
    table = Table(
        f"{cell(task).text}: {len(rows)} of {len(groups):,} examples",
        ["example", *(cell(m).text for m in models)],
        rows,
    )
    return [Folded(f"{cell(task).text}: {len(rows)} of {len(groups):,} examples with records", [table])]


def _is_output(name: str) -> bool:
    return any(word in name for word in ("predict", "probab", "answer", "output", "generat", "score", "correct"))


def _cell(fields: Record) -> Cell:
    """Return a cell with one line per field of a record. The location of a row is shown without folders."""
    shown = {
        name: PurePath(value).name if name == "row" and isinstance(value, str) else value
        for name, value in fields.items()
    }
    return cell("\n".join(f"{name.replace('_', ' ')}: {_text(value)}" for name, value in shown.items()) or "–")


def _text(value: Any) -> str:
    if figures.is_number(value):
        return f"{value:g}"
    text = value if isinstance(value, str) else ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
