"""Format the results of an evaluation as tables, for a terminal and for a Markdown file.

A result is a dict with the keys "artifact", "digest", "content", "task", "protocol" and "metrics". It also has fields
of the artifact: "stage", "parameters", "weight_bytes", "bytes", "sparsity" and "bits".

An artifact that was measured on several tasks has several results. They form one table row, or one row per task if
metrics of different tasks have the same name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmctl.evaluate.metrics.base import columns, find

if TYPE_CHECKING:
    from rich.table import Table

Result = dict[str, Any]

_ARTIFACT: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("artifact", "artifact", str),
    ("task", "task", str),
    ("stage", "stage", str),
    ("parameters", "parameters", lambda n: f"{n:,}"),
    ("weight_bytes", "weight bytes", lambda n: f"{n:,}"),
    ("bytes", "bytes on disk", lambda n: f"{n:,}"),
    ("sparsity", "sparsity", lambda s: f"{s:.0%}" if s else "–"),
    ("bits", "bits", lambda b: f"{b:.3g}"),
)


def lines(results: Sequence[Result]) -> list[Result]:
    """Return one flat record per artifact, with the metrics of all its tasks, in the order of the results.

    If two results of an artifact contain a metric of the same name, return one record per result, with the key "task".
    """
    seen = Counter((r["artifact"], name) for r in results for name in r["metrics"])
    apart = max(seen.values(), default=0) > 1
    omitted = ("metrics", "protocol") if apart else ("metrics", "protocol", "task")
    merged: dict[tuple[str, str], Result] = {}
    for result in results:
        flat = {k: v for k, v in result.items() if k not in omitted}
        key = (result["artifact"], result["task"] if apart else "")
        merged.setdefault(key, {}).update({**flat, **result["metrics"]})
    return list(merged.values())


def determined(results: Sequence[Result]) -> list[Result]:
    """Return the results without values that vary between runs with equal weights: times and bytes on disk."""

    def same(name: str) -> bool:
        record = find(name)
        return record is None or record.aspect != "speed"

    kept = [{k: v for k, v in r.items() if k not in ("bytes", "timed_on")} for r in results]
    return [{**r, "metrics": {k: v for k, v in r["metrics"].items() if same(k)}} for r in kept]


def cells(results: Sequence[Result], wide: bool = True) -> tuple[list[str], list[list[str]]]:
    """Return the table as text: (headings, rows of cells). A missing value is a dash.

    Args:
        results: Results to show.
        wide: If false, omit the stage and some metrics, so that the table fits about 100 characters.
    """
    records = lines(results)
    there = {k for r in records for k, v in r.items() if v is not None}
    shown = [c for c in _ARTIFACT if c[0] in there and (wide or c[0] not in ("stage", "bytes"))]
    shown += [(m.name, m.title, m.text) for m in columns(there, "file" if wide else "terminal")]
    body = [[form(r[key]) if r.get(key) is not None else "–" for key, _, form in shown] for r in records]
    return [title for _, title, _ in shown], body


def headline(result: Result) -> str:
    """Return one line with the task and its quality metrics, with their 95 % intervals and baselines if known."""
    found = {k: v for k, v in result["metrics"].items() if v is not None}
    said = []
    for m in columns(found, "file"):
        if m.aspect != "quality":
            continue
        part = f"{m.title} {m.text(found[m.name])}"
        if f"{m.name}_low" in found:
            low, high = (m.text(found[f"{m.name}_{end}"]) for end in ("low", "high"))
            part += f" (95 % interval {low} to {high})"
        if m.baseline in found:
            part += f" (baseline that ignores the input: {m.text(found[m.baseline])})"
        said.append(part)
    return f"{result['task']}: {', '.join(said)}"


def protocols(results: Sequence[Result]) -> list[str]:
    """Return the distinct protocols of the results as "task: protocol".

    Metrics are comparable only if they were measured with the same protocol.
    """
    return list(dict.fromkeys(f"{r['task']}: {r['protocol']}" for r in results))


def markdown(results: Sequence[Result]) -> str:
    """Return a Markdown table of the results, followed by the protocols and the digests of the scored weights."""
    head, body = cells(results)
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] + ["--:"] * (len(head) - 1), *body)]
    digests = dict.fromkeys(f"- `{r['artifact']}`: `{r['digest']}`" for r in results)
    notes = [f"- {p}" for p in protocols(results)]
    return "\n".join([*table, "", "Protocols", "", *notes, "", "Digests of the scored weights", "", *digests, ""])


def table(results: Sequence[Result], title: str = "") -> Table:
    """Return a table of the results for the terminal, with the protocols as its caption."""
    from rich.table import Table

    head, body = cells(results, wide=False)
    rich_table = Table(title=title or None, caption="\n".join(protocols(results)), title_justify="left")
    for i, heading in enumerate(head):
        rich_table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in body:
        rich_table.add_row(*row)
    return rich_table
