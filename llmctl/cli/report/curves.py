"""Plot the logs of training: losses, metrics and speed by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.cli.report import figures, plots
from llmctl.cli.report.document import Block, Columns, Number, Paragraph, Plot, Section, Table, cell, number
from llmctl.cli.report.run_contents import Contents
from llmctl.evaluate.metrics.base import VALIDATION

Points = list[tuple[float, float]]

AFTER = ("tokens_per_second", "examples_per_second", "learning_rate", "gradient_norm")
"""Logged values that have one plot each. These plots follow the plots of losses and metrics."""
TITLES = {"learning_rate": "learning rate", "gradient_norm": "norm of the gradient"}
WITHOUT = ("step", "time", "layer", "step_seconds", "input_wait", "mfu", "memory_gib")
"""Logged values that are not plotted."""
BUDGET = 8_000
"""Maximum number of points of all curves together, which limits the size of the page."""


def section(contents: Contents) -> Section:
    """Return the section with the learning curves of all stages that wrote a training log."""
    logs = [(m.name, m.log, "") for m in contents.models] + [
        (u.name, u.log, " (not finished)") for u in contents.unfinished
    ]
    trained = [(name, groups, more) for name, log, more in logs if (groups := _groups(log))]
    if not trained:
        return Section("Learning curves", [Paragraph("No stage of this run left a training log.")])
    count = sum(len(series) for _, groups, _ in trained for series in groups.values())
    most = max(30, min(plots.MOST_POINTS, BUDGET // count))
    parts: list[Block] = [
        Paragraph(
            "The sliders below a plot, or dragging across it with a mouse, select a range of steps. A double click "
            f"shows all steps. Series with more than {most} points show the extremes of each interval."
        )
    ]
    for name, groups, more in trained:
        drawn = [_plot(name, group, series, most) for group, series in groups.items()]
        parts.append(Section(cell(f"{name}{more}").text, [Columns(drawn)]))
    return Section("Learning curves", parts)


def _groups(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Return {group: {name of the logged value: points}}. A value and its validation counterpart form a group."""
    series: dict[str, Points] = {}
    for line in log:
        for name, value in line.items():
            if name not in WITHOUT and figures.is_number(value) and figures.is_number(line.get("step")):
                series.setdefault(name, []).append((line["step"], value))
    if "loss" not in series:
        return {}
    groups: dict[str, dict[str, Points]] = {}
    bare = dict.fromkeys(name.removeprefix(VALIDATION) for name in series)
    first = [n for n in bare if n == "loss"] + [n for n in bare if n != "loss" and f"{VALIDATION}{n}" in series]
    for name in [*first, *(n for n in AFTER if n in series)]:
        both = (name, f"{VALIDATION}{name}")
        groups[name] = {n: series[n] for n in both if n in series}
    return groups


def _plot(stage: str, group: str, series: Mapping[str, Points], most: int) -> Plot:
    known = figures.record(group)
    scale = 100.0 if known and known.format.endswith("%}") else 1.0
    title = TITLES.get(group) or figures.title(group)
    kept = {_label(name): plots.thinned(points, most) for name, points in series.items()}
    spec = plots.lines(kept, "step", f"{title} (%)" if scale == 100.0 else title, scale)
    at: dict[Number, dict[str, Number]] = {}
    for name, points in kept.items():
        for step, value in points:
            at.setdefault(step, {})[name] = value
    rows = [[number(step), *(number(found.get(name)) for name in kept)] for step, found in sorted(at.items())]
    table = Table(f"{title} of {cell(stage).text} by step", ["step", *kept], rows)
    ends = "; ".join(
        f"{name}: {figures.value_text(group, points[0][1])} at step {points[0][0]:,}, "
        f"{figures.value_text(group, points[-1][1])} at step {points[-1][0]:,}"
        for name, points in kept.items()
    )
    return Plot(cell(f"{stage}: {title}").text, spec, f"{title} of {cell(stage).text} by training step. {ends}.", table)


def _label(name: str) -> str:
    return "validation" if name.startswith(VALIDATION) else "training"
