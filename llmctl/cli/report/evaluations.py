"""Show the results of evaluations: a table per task, plots of intervals, and differences between artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.cli.report import classes, figures, json_tables, plots
from llmctl.cli.report.document import Block, Columns, Folded, Paragraph, Plot, Section, Table, cell, number
from llmctl.cli.report.run_contents import Contents, Evaluation, Record
from llmctl.evaluate.metrics.base import UNDER
from llmctl.evaluate.report import comparison_cells

MOST_ROWS = 40
"""Maximum number of metrics in a plot of intervals."""


def section(contents: Contents) -> Section:
    """Return the section with the results of all evaluations."""
    parts: list[Block] = []
    for evaluation in contents.evaluations:
        tasks = dict.fromkeys(r["task"] for r in evaluation.results)
        found: list[Block] = [_task(task, [r for r in evaluation.results if r["task"] == task]) for task in tasks]
        if evaluation.comparisons:
            found.append(_comparisons(evaluation))
        parts += [Section(cell(evaluation.name).text, found)] if len(contents.evaluations) > 1 else found
    return Section("Results of evaluations", parts or [Paragraph("This run has no evaluation.")])


def _task(task: str, results: Sequence[Record]) -> Section:
    protocols = dict.fromkeys(r["protocol"] for r in results)
    parts: list[Block] = [Paragraph(f"Protocol: {cell(p).text}.") for p in protocols]
    parts += [Paragraph(line) for line in dict.fromkeys(map(_timing, results)) if line]
    parts.append(table(task, results))
    parts.append(Columns(intervals(task, results)))
    parts += classes.blocks(results)
    for r in results:
        rest = {k: v for k, v in r["metrics"].items() if isinstance(v, (dict, list)) and v and k not in classes.SHOWN}
        if rest:
            parts.append(Folded(f"{cell(r['artifact']).text}: further results", json_tables.blocks(rest)))
    return Section(cell(task).text, parts)


def _timing(result: Record) -> str:
    """Return a line about how times were measured; empty if no times were measured."""
    if not result.get("timed_on"):
        return ""
    batch, rounds = (result.get(f"timed_{key}", "?") for key in ("batch", "rounds"))
    return cell(f"Times: {result['timed_on']}, at most {rounds} rounds, batches of {batch} for throughput.").text


def table(task: str, results: Sequence[Record]) -> Table:
    """Return the table of all numbers of a task: one row per metric, one column per model."""
    names = figures.ordered(name for r in results for name in figures.scalars(r["metrics"]))
    rows = [[cell(figures.title(name)), *(figures.metric_cell(r["metrics"], name) for r in results)] for name in names]
    caption = f"{cell(task).text}: all metrics, with 95 % intervals"
    return Table(caption, ["metric", *(cell(r["artifact"]).text for r in results)], rows)


def intervals(task: str, results: Sequence[Record]) -> list[Plot]:
    """Return plots of metrics between -1 and 1 with their 95 % intervals.

    A metric that was measured on changed texts has a plot of its own, with one row per change. One further plot shows
    all other metrics.

    A plot with only one metric is omitted, because the plot of quality against cost shows this metric.
    """
    named = figures.ordered(name for r in results for name in r["metrics"] if figures.interval(r["metrics"], name))
    groups: dict[str, list[str]] = {}
    for name in named:
        values = [v for r in results if figures.is_number(v := r["metrics"].get(name))]
        if figures.is_ratio(name, values):
            base = name.partition(UNDER)[0]
            changed = any(other.startswith(base + UNDER) for other in named)
            groups.setdefault(base if changed else "", []).append(name)
    return [_intervals(task, base, names[:MOST_ROWS], results) for base, names in groups.items() if len(names) > 1]


def _intervals(task: str, base: str, names: Sequence[str], results: Sequence[Record]) -> Plot:
    """Return the plot of the metrics `names`. If `base` is not empty, each of them is the metric `base`, measured on
    texts with another change."""
    series = [cell(name).text for name in dict.fromkeys(r["artifact"] for r in results)]
    labels = {name: figures.title(name) for name in names}
    if base:
        labels = {name: cell(name.partition(UNDER)[2].replace("_", " ") or "unchanged").text for name in names}
    values: list[dict[str, Any]] = []
    for r in results:
        for name in names:
            value, ends = r["metrics"].get(name), figures.interval(r["metrics"], name)
            if figures.is_number(value):
                point = {"row": labels[name], "series": cell(r["artifact"]).text, "value": value}
                values.append(point | ({"low": ends[0], "high": ends[1]} if ends else {}))
    what = figures.title(base) if base else "metrics"
    spec = plots.intervals(values, list(labels.values()), series, f"{what}, 95 % interval")
    rows = [[cell(figures.title(n)), *(figures.metric_cell(r["metrics"], n) for r in results)] for n in names]
    drawn = Table(f"{what} with 95 % intervals", ["metric", *(cell(r["artifact"]).text for r in results)], rows)
    description = f"{len(names)} values of {what} ({cell(task).text}) for {len(series)} models, each with its interval."
    return Plot(f"{cell(task).text}: {what} with intervals", spec, description, drawn)


def _comparisons(evaluation: Evaluation) -> Section:
    head, body = comparison_cells(evaluation.comparisons)
    rows = [[cell(text) for text in row] for row in body]
    about = evaluation.comparisons[0]
    text = f"Both models were measured on the same {about['examples']:,} examples; {about['resamples']:,} resamples."
    values = Folded(
        "Exact differences",
        [
            Table(
                f"{cell(one['artifact']).text} minus {cell(one['against']).text}, {cell(one['task']).text}",
                ["metric", "difference", "low", "high", "p-value"],
                [[cell(name), *(number(found.get(key)) for key in EXACT)] for name, found in one["metrics"].items()],
            )
            for one in evaluation.comparisons
        ],
    )
    return Section("Differences", [Paragraph(text), Table("Paired differences", head, rows), values])


EXACT = ("difference", "difference_low", "difference_high", "p_value")
