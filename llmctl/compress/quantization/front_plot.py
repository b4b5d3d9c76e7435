"""Plot the mixtures of formats that a format search compared: bits per weight against perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_POINT, _CHOSEN, _QUIET, _LINE = "#0b6bcb", "#cf222e", "#6e7781", "#d0d7de"


def points(about: Mapping[str, Any], which: str) -> tuple[list[float], list[float]]:
    """Return (bits per weight, relative increases of the perplexity) of the mixtures for which the increase is known.

    >>> about = {"front": [{"bits": 3.5, "predicted": None}, {"bits": 4.5, "predicted": 0.02}]}
    >>> points(about, "predicted")
    ([4.5], [0.02])

    Args:
      about: JSON data of the choice (`llmctl.compress.quantization.format_scan.choose`).
      which: "predicted" or "measured".
    """
    known = [mixture for mixture in about["front"] if mixture.get(which) is not None]
    return [mixture["bits"] for mixture in known], [mixture[which] for mixture in known]


def plot(about: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with the Pareto front, the measured mixtures, the chosen mixture, and the limit of the budget.

    Args:
      about: JSON data of the choice.
      path: the file.

    Raises:
      ImportError: If matplotlib (the `demo` extra) is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.5, 4.4), dpi=160, layout="constrained")
    ax = figure.subplots()
    ax.plot(*points(about, "predicted"), color=_QUIET, linewidth=1, marker=".", markersize=3, label="predicted")
    ax.scatter(*points(about, "measured"), s=40, color=_POINT, zorder=3, label="measured")
    if about["measured"] is not None:
        ax.scatter([about["bits"]], [about["measured"]], s=150, marker="*", color=_CHOSEN, zorder=4, label="chosen")
    limit = ax.axvline if about["kind"] == "average_bits" else ax.axhline
    limit(about["limit"], color=_CHOSEN, linewidth=0.8, linestyle="--", label="limit")
    ax.set_yscale("symlog", linthresh=0.01)
    increases = [*points(about, "predicted")[1], *points(about, "measured")[1]]
    ax.set_ylim(bottom=min([0.0, *increases]) - 0.0005)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.set_xlabel("bits per weight, scales included", color=_QUIET)
    ax.set_ylabel("increase of the perplexity on the calibration data", color=_QUIET)
    ax.grid(axis="y", color=_LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(colors=_QUIET, labelsize=9)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(fontsize=9, frameon=False)
    FigureCanvasAgg(figure).print_png(path)
