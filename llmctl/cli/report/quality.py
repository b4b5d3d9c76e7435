"""Plot the quality of models against their bytes and latency, and mark the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.cli import summary
from llmctl.cli.report import figures, plots
from llmctl.cli.report.document import Block, Columns, Paragraph, Plot, Section, Table, cell, number
from llmctl.cli.report.run_contents import Contents, Record
from llmctl.evaluate.metrics.base import METRICS, Metric, columns

COSTS = (
    ("weight_bytes", "bytes of weights in memory", "bytes"),
    ("latency_p50", "latency of one example (ms)", "latency"),
)
"""Costs on the horizontal axes: field, title of the axis, and name in texts."""


def front(points: Sequence[tuple[float, float]], maximize: bool) -> list[bool]:
    """Return whether each point (cost, quality) is on the Pareto front.

    A point dominates another point if it is better in cost or quality, and worse in neither. The front consists of the
    points that no point dominates.

    Example:
        >>> front([(1, 0.5), (2, 0.9), (3, 0.8), (2, 0.7)], maximize=True)
        [True, True, False, False]
    """
    signed = [(cost, -quality if maximize else quality) for cost, quality in points]
    return [not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in signed) for p in signed]


def section(contents: Contents) -> Section:
    """Return the section with quality against cost, for each evaluation and task."""
    parts: list[Block] = []
    for evaluation in contents.evaluations:
        for task in dict.fromkeys(r["task"] for r in evaluation.results):
            results = [r for r in evaluation.results if r["task"] == task]
            metric = main_metric(results)
            drawn = [plot for cost in COSTS if metric and (plot := _plot(results, metric, cost))]
            if drawn:
                named = f"{evaluation.name}: {task}" if len(contents.evaluations) > 1 else task
                parts.append(Section(cell(named).text, [Columns(drawn)]))
    if not parts:
        return Section("Quality against cost", [Paragraph("No evaluation measured a metric of quality on two models.")])
    text = "Filled points are on the Pareto front: no measured model is cheaper and at least as good."
    text += " Bars are 95 % intervals."
    return Section("Quality against cost", [Paragraph(text), *parts])


def main_metric(results: Sequence[Record]) -> Metric | None:
    """Return the first registered quality metric that the results contain; None if they contain none."""
    there = {k for r in results for k, v in r["metrics"].items() if figures.is_number(v)}
    found = [m for m in columns(there, "run") if m.aspect == "quality"]
    return found[0] if found else None


def _plot(results: Sequence[Record], metric: Metric, cost: tuple[str, str, str]) -> Plot | None:
    field, axis, named = cost
    found = [{**r, "cost": r.get(field, r["metrics"].get(field))} for r in results]
    found = [r for r in found if figures.is_number(r["cost"]) and figures.is_number(r["metrics"].get(metric.name))]
    if len(found) < 2:
        return None
    best = front([(r["cost"], r["metrics"][metric.name]) for r in found], metric.better != "minimize")
    scale = METRICS[field].scale if field in METRICS else 1.0
    values: list[dict[str, Any]] = []
    for r, on_front in zip(found, best, strict=True):
        ends = figures.interval(r["metrics"], metric.name)
        point = {
            "name": cell(r["artifact"]).text,
            "x": r["cost"] * scale,
            "y": r["metrics"][metric.name],
            "front": on_front,
        }
        values.append(point | ({"low": ends[0], "high": ends[1]} if ends else {}))
    costs = [v["x"] for v in values]
    log = min(costs) > 0 and max(costs) > 3 * min(costs)
    percent = metric.format.endswith("%}")
    spec = plots.tradeoff(values, axis, metric.title, log, percent, sum(best) > 1)
    rows = [
        [
            cell(r["artifact"]),
            _cost(field, r["cost"]),
            figures.metric_cell(r["metrics"], metric.name),
            cell("on the front" if b else "–"),
        ]
        for r, b in zip(found, best, strict=True)
    ]
    table = Table(f"{metric.title} and {named}", ["model", axis, metric.title, "Pareto front"], rows)
    names = ", ".join(v["name"] for v in values if v["front"])
    description = f"{metric.title} against {named} of {len(found)} models. On the Pareto front: {names}."
    return Plot(f"{metric.title} against {named}", spec, description, table, width=520)


def _cost(field: str, value: float) -> Any:
    text = METRICS[field].text(value) + " ms" if field in METRICS else summary.size(value)
    return number(value, text)
