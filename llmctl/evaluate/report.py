"""Format the results of an evaluation as tables, for a terminal and for a Markdown file.

A result is a dict with the keys "artifact", "digest", "content", "task", "protocol" and "metrics". The dict also has
fields of the artifact: "stage", "parameters", "weight_bytes", "bytes", "sparsity" and "bits".

An artifact that was measured on several tasks has several results. In the file, an artifact has one row. If two tasks
have a metric of the same name, the artifact has one row per task. In the terminal, each result is a column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmctl.evaluate.metrics.base import METRICS, UNDER, change_of, columns, find, text

if TYPE_CHECKING:
    from rich.table import Table

Result = dict[str, Any]

YARDSTICK = "yardstick"
"""Value of the keys "artifact" and "stage" in the result of a yardstick (see `llmctl.evaluate.yardstick`)."""

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

    If two results of an artifact contain a metric of the same name, return one record per result. Each of these records
    has the key "task".
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
    """Return the results without the values that may differ between two runs with equal weights.

    Such values are times, throughput, device names and sizes on disk.
    """

    def same(name: str) -> bool:
        record = find(name)
        return record is None or record.aspect != "speed"

    kept = [{k: v for k, v in r.items() if k != "bytes" and not k.startswith("timed_")} for r in results]
    return [{**r, "metrics": {k: v for k, v in r["metrics"].items() if same(k)}} for r in kept]


def cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table for the Markdown file as (headings, rows of cells). A missing value is a dash."""
    records = lines(results)
    there = {k for r in records for k, v in r.items() if v is not None}
    shown = [c for c in _ARTIFACT if c[0] in there]
    shown += [(m.name, m.title, m.text) for m in columns(there, "file")]
    body = [[form(r[key]) if r.get(key) is not None else "–" for key, _, form in shown] for r in records]
    return [title for _, title, _ in shown], body


def headline(result: Result) -> str:
    """Return one line with the task and its quality metrics.

    The value of a metric is followed by the 95 % interval and the baseline, if they are known. Values on changed inputs
    follow at the end.
    """
    found = {k: v for k, v in result["metrics"].items() if v is not None}
    parts = []
    for m in columns(found, "file"):
        if m.aspect != "quality":
            continue
        part = f"{m.title} {m.text(found[m.name])}"
        if f"{m.name}_low" in found:
            low, high = (m.text(found[f"{m.name}_{end}"]) for end in ("low", "high"))
            part += f" (95 % interval {low} to {high})"
        if m.baseline in found:
            part += f" (baseline that ignores the input: {m.text(found[m.baseline])})"
        parts.append(part)
    for name in found:
        metric, change = change_of(name)
        if change and metric in found and not name.endswith(("_low", "_high")):
            parts.append(f"under {change.replace('_', ' ')} {text(name, found[name])}")
    return f"{result['task']}: {', '.join(parts)}"


def protocols(results: Sequence[Result]) -> list[str]:
    """Return a line "task: protocol" for each distinct protocol of the results.

    A protocol describes a measurement, such as its split and truncation. Metrics are comparable only if they were
    measured with the same protocol.
    """
    return list(dict.fromkeys(f"{r['task']}: {r['protocol']}" for r in results))


def markdown(results: Sequence[Result], compared: Sequence[Result] = ()) -> str:
    """Return a Markdown table of the results, followed by the protocols and the digests of the scored weights.

    Metrics on changed inputs are in a table of their own. If artifacts are compared, a further table has the
    differences.
    """
    table = _markdown(*cells(results))
    head, body = change_cells(results)
    table += ["", "On changed texts, with 95 % intervals", "", *_markdown(head, body)] if body else []
    if compared:
        table += ["", "Differences", "", *_markdown(*comparison_cells(compared))]
    digests = dict.fromkeys(f"- `{r['artifact']}`: `{r['digest']}`" for r in results)
    notes = [f"- {p}" for p in protocols(results)]
    return "\n".join([*table, "", "Protocols", "", *notes, "", "Digests of the scored weights", "", *digests, ""])


def change_cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table of metrics on changed inputs as (headings, rows of cells), with one row per change.

    The first row of a result has the values without a change.
    """
    names = {name for result in results for name in result["metrics"] if change_of(name)[1]}
    shown = [m for m in METRICS if any(change_of(name)[0] == m for name in names)]
    body = []
    for result in results:
        found = {k: v for k, v in result["metrics"].items() if v is not None}
        changes = dict.fromkeys(change_of(k)[1] for k in found if not k.endswith(("_low", "_high")) and UNDER in k)
        for change in ["", *changes] if changes else ():
            keys = [f"{m}{UNDER}{change}" if change else m for m in shown]
            values = [_with_interval(found, key) for key in keys]
            body.append([result["artifact"], result["task"], change.replace("_", " ") or "–", *values])
    return ["artifact", "task", "change", *(METRICS[m].title for m in shown)], body


def _with_interval(found: Result, name: str) -> str:
    """Format a metric with the bounds of its 95 % interval; return a dash if there is no such metric."""
    if name not in found:
        return "–"
    ends = [text(name, found[key]) for key in (f"{name}_low", f"{name}_high") if key in found]
    return text(name, found[name]) + (f" ({' to '.join(ends)})" if ends else "")


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] + ["--:"] * (len(head) - 1), *body)]


def comparison_cells(compared: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the differences between the metrics of artifacts as a table: (headings, rows of cells).

    The table has one row per pair of artifacts and metric.

    The columns with artifacts and task are omitted if they are equal in all rows.
    """
    about = {"artifact": "artifact", "against": "against", "task": "task"}
    shown = [key for key in about if len({one[key] for one in compared}) > 1]
    names = [one[key] for key in ("artifact", "against") for one in compared[:1]]
    sides = ["value", "against"] if "artifact" in shown else names
    body = []
    for one in compared:
        for name, found in one["metrics"].items():
            record = find(name)
            value, other, low, high = (
                text(name, found[key]) for key in ("value", "against", "difference_low", "difference_high")
            )
            apart = text(name, found["difference"])
            apart = apart if apart.startswith("-") else f"+{apart}"
            title = record.title if record else name.replace("_", " ")
            p = f"{found['p_value']:.2g} ({found['test']})"
            body.append([title, *(one[key] for key in shown), value, other, apart, f"{low} to {high}", p])
    return ["metric", *(about[key] for key in shown), *sides, "difference", "95 % interval", "p-value"], body


def comparison_table(compared: Sequence[Result]) -> Table:
    """Return a terminal table of the differences in metrics between each artifact and the reference artifact."""
    from rich.table import Table

    head, body = comparison_cells(compared)
    out = Table()
    for heading in head:
        out.add_column(heading, justify="left" if heading == "metric" else "right")
    for row in body:
        out.add_row(*row)
    return out


def table(results: Sequence[Result]) -> Table:
    """Return a table for the terminal: one row per metric and one column per result.

    The name of a metric is its JSON key with spaces in place of underscores. The bounds of an interval share a
    row. The table omits metrics whose names have at least two slashes, such as "accuracy/gender/female".
    """
    from rich.table import Table

    found = [{k: v for k, v in r["metrics"].items() if isinstance(v, (int, float))} for r in results]
    names = dict.fromkeys(name for one in found for name in one if name.count("/") < 2)
    ends = {f"{name}_{end}" for name in names for end in ("low", "high")}
    several = len({r["task"] for r in results}) > 1
    out = Table()
    out.add_column("metric", no_wrap=True)
    for result in results:
        out.add_column(result["artifact"] + (f": {result['task']}" if several else ""), justify="right")
    for name in (name for name in names if name not in ends):
        record = find(name)
        heading = record.title if record and record.unit == "s" else name.replace("_", " ")  # its title has the unit
        out.add_row(heading, *(text(name, one[name]) if name in one else "–" for one in found))
        if f"{name}_low" in names:
            out.add_row("  95 % interval", *(_interval(one, name) for one in found))
    return out


def _interval(metrics: Result, name: str) -> str:
    """Format the bounds of a metric's 95 % interval; return a dash if the metric has no interval."""
    ends = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
    return " to ".join(text(name, v) for v in ends if v is not None) or "–"
