"""Plot quality against weight bytes and speed, one point per artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmctl.evaluate import report
from llmctl.evaluate.metrics.base import METRICS, Metric, columns

_INK, _QUIET, _LINE, _POINT = "#1b1f24", "#6e7781", "#d0d7de", "#0b6bcb"


def tradeoff(results: Sequence[report.Result], path: Path) -> bool:
    """Write a PNG that plots quality against weight bytes, with 95 % intervals if known.

    The quality axis shows one metric. Candidates are the measured quality metrics in the table of `llmctl run`. The
    first candidate in the order of the registry is used. If speed was measured, a second plot shows quality against
    examples per second.

    Returns:
        True if the PNG was written; False if the results have no metric to plot.

    Raises:
        ImportError: If matplotlib (the `demo` extra) is not installed.
    """
    records = [r for r in report.lines(results) if r.get("weight_bytes")]
    there = {k for r in records for k, v in r.items() if v is not None}
    metric = next((m for m in columns(there, "run") if m.aspect == "quality"), None)
    if metric is None:
        return False
    # The object interface needs no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [r for r in records if r.get(metric.name) is not None]
    timed = [r for r in records if r.get("examples_per_second")]
    figure = Figure(figsize=(10.5 if timed else 6.5, 4.4), dpi=160, layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    _draw(axes[0], records, "weight_bytes", metric)
    if timed:
        _draw(axes[1], timed, "examples_per_second", metric)
        axes[1].set_ylabel("")
    FigureCanvasAgg(figure).print_png(path)
    return True


def _draw(ax: Any, records: Sequence[report.Result], x: str, metric: Metric) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    name, (low, high) = metric.name, (f"{metric.name}_low", f"{metric.name}_high")
    xs, ys = [r[x] for r in records], [r[name] for r in records]
    for task in dict.fromkeys(r.get("task") for r in records):  # one line per task, in the order of the stages
        own = [r for r in records if r.get("task") == task and r.get("stage") != report.YARDSTICK]
        ax.plot([r[x] for r in own], [r[name] for r in own], color=_LINE, linewidth=1.2, zorder=1)
    judged = [r for r in records if low in r]  # no interval for words, which are not independent
    if judged:
        off = [[r[name] - r[low] for r in judged], [r[high] - r[name] for r in judged]]
        at = [r[x] for r in judged], [r[name] for r in judged]
        ax.errorbar(*at, yerr=off, fmt="none", ecolor=_QUIET, elinewidth=1, capsize=3, zorder=2)
    if metric.format.endswith("%}"):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.scatter(xs, ys, s=46, color=_POINT, edgecolor="white", linewidth=1, zorder=3)
    ax.set_xscale("log")
    ax.margins(x=0.18, y=0.16)
    middle = (min(xs) * max(xs)) ** 0.5
    for at, record in enumerate(records):
        above, left = at % 2 == 0, record[x] > middle  # labels extend inwards, neighbours to different sides
        ax.annotate(
            "\n".join(filter(None, (record["artifact"], record.get("task")))),
            (record[x], record[name]),
            xytext=(-6 if left else 6, 6 if above else -6),
            textcoords="offset points",
            ha="right" if left else "left",
            va="bottom" if above else "top",
            fontsize=9,
            color=_INK,
        )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if max(xs) < 20 * min(xs):  # powers of ten are too few ticks within about a decade
        ax.set_xticks(_ticks(min(xs), max(xs)))
    label = "bytes of weights" if x == "weight_bytes" else METRICS[x].unit
    ax.set_xlabel(f"{label} (log scale)", color=_QUIET)
    ax.set_ylabel(f"held-out {metric.title}" + " (95 % interval)" * bool(judged), color=_QUIET)
    ax.grid(axis="y", color=_LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(_LINE)
    ax.tick_params(colors=_QUIET, labelsize=9)


def _ticks(low: float, high: float) -> list[float]:
    """Return positions of axis ticks: 1, 2 and 5 times powers of ten, from just below `low` to just above `high`."""
    out, power = [], 1.0
    while power * 10 <= low:
        power *= 10
    while power <= high * 2:
        out += [m * power for m in (1.0, 2.0, 5.0) if low / 2 <= m * power <= high * 2]
        power *= 10
    return out


def _short(value: float) -> str:
    """Format a number with a unit prefix: 1200 -> 1.2k, 3.5e6 -> 3.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
