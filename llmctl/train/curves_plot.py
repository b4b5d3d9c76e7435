"""Plot learning curves: a validation metric against the training step, with one curve per training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmctl.evaluate.metrics.base import METRICS

_COLORS, _QUIET, _LINE = ("#0b6bcb", "#6e7781", "#cf222e"), "#6e7781", "#d0d7de"


def plot(curves: Mapping[str, Sequence[Mapping[str, float]]], name: str, path: Path) -> None:
    """Write a PNG with one line per training.

    Args:
      curves: metrics of each validation, with the entry "step", by the title of the training.
      name: metric to plot, such as "validation_loss".
      path: the file.

    Raises:
      ImportError: If matplotlib (the `demo` extra) is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.0), dpi=160, layout="constrained")
    ax = figure.subplots()
    for color, (title, curve) in zip(_COLORS, curves.items(), strict=False):
        known = [one for one in curve if name in one]
        values = [one[name] for one in known]
        ax.plot([one["step"] for one in known], values, color=color, marker=".", linewidth=1.5, label=title)
    metric = METRICS[name.removeprefix("validation_")]
    ax.set_xlabel("step", color=_QUIET)
    ax.set_ylabel(f"{metric.title} on the validation data", color=_QUIET)
    ax.grid(axis="y", color=_LINE, linewidth=0.6)
    ax.tick_params(colors=_QUIET, labelsize=9)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(fontsize=9, frameon=False)
    FigureCanvasAgg(figure).print_png(path)
