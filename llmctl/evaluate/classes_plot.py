"""Plot the predictions of classifiers: confusion matrix, and accuracy against confidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.evaluate import report

MOST = 8
"""Maximum number of artifacts in the plot; further artifacts are omitted."""
NAMED = 12
"""Maximum number of classes whose names and counts are written into the confusion matrix."""


def classes(results: Sequence[report.Result], path: Path) -> bool:
    """Write a PNG with a row of two plots per classifier.

    The left plot is the confusion matrix, normalized per true class. The right plot shows the accuracy of the
    predictions in each confidence bin. Calibrated probabilities are on the diagonal.

    Returns:
        True if the PNG was written; False if no artifact is a classifier.

    Raises:
        ImportError: If matplotlib (the `demo` extra) is not installed.
    """
    shown = [r for r in results if r["metrics"].get("confusion") and r["metrics"].get("reliability")][:MOST]
    if not shown:
        return False
    # The object interface needs no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2 * len(shown)), dpi=120, layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for (left, right), result in zip(axes, shown, strict=True):
        _confusion(left, result["artifact"], result["metrics"])
        _reliability(right, result["metrics"])
    FigureCanvasAgg(figure).print_png(path)
    return True


def _confusion(ax: Any, title: str, metrics: dict[str, Any]) -> None:
    counts_CC, names = np.array(metrics["confusion"]), list(metrics["per_class"])
    shares_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    ax.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    ax.set(title=title, xlabel="predicted class", ylabel="true class")
    if len(names) > NAMED:
        return
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    ax.set_yticks(range(len(names)), names, parse_math=False)
    for (i, j), count in np.ndenumerate(counts_CC):
        ax.text(j, i, f"{count:,}", ha="center", va="center", color="white" if shares_CC[i, j] > 0.5 else "black")


def _reliability(ax: Any, metrics: dict[str, Any]) -> None:
    count_M, sure_M, right_M = np.array(metrics["reliability"]).T
    ax.plot([0, 1], [0, 1], color="#d0d7de", linewidth=1)
    ax.scatter(sure_M, right_M, s=10 + 190 * count_M / count_M.sum(), color="#0b6bcb", alpha=0.8)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    ax.set_title(f"calibration error {metrics['ece']:.3f}")
