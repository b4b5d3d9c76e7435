"""Show what classifiers predict: confusion matrices, calibration curves, and scores per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from llmctl.cli.report import figures, json_tables, plots
from llmctl.cli.report.document import Block, Columns, Folded, Plot, Table, cell, number
from llmctl.cli.report.run_contents import Record

SHOWN = ("confusion", "per_class", "reliability")
"""Metrics that this module shows. `llmctl.evaluate.metrics` defines them."""
COUNTED = 12
"""Maximum number of classes whose counts are written into the plot."""
DRAWN = 40
"""Maximum number of classes in a plot of a confusion matrix."""
MOST_PAIRS = 40
"""Maximum number of rows in the table of the most frequent confusions."""


def blocks(results: Sequence[Record]) -> list[Block]:
    """Return the confusion matrix, the calibration curve and the scores per class of each classifier."""
    found: list[Block] = []
    for r in results:
        name, metrics = cell(r["artifact"]).text, r["metrics"]
        drawn = [plot for plot in (confusion(name, metrics), calibration(name, metrics)) if plot]
        if drawn:
            found.append(Columns(drawn))
        if isinstance(metrics.get("per_class"), dict) and metrics["per_class"]:
            found.append(Folded(f"{name}: scores per class", json_tables.blocks({"per class": metrics["per_class"]})))
    return found


def confusion(name: str, metrics: Record) -> Plot | Table | None:
    """Return the plot of a confusion matrix, or None if the metrics have none.

    If there are more than `DRAWN` classes, return the table of the most frequent confusions.
    """
    counts, classes = metrics.get("confusion"), metrics.get("per_class")
    if not _is_matrix(counts) or not isinstance(classes, dict) or len(classes) != len(counts):
        return None
    names = _distinct([cell(c).text for c in classes])
    values: list[Record] = []
    for i, row in enumerate(counts):
        total = max(sum(row), 1)
        for j, count in enumerate(row):
            if not count and len(names) > COUNTED:
                continue  # most cells of many classes are empty
            values.append({"true": names[i], "predicted": names[j], "count": count, "share": round(count / total, 6)})
    if len(names) > DRAWN:
        return _frequent(name, values)
    if len(names) <= COUNTED:
        rows = [[cell(names[i]), *(number(count) for count in row)] for i, row in enumerate(counts)]
        table = Table(f"Confusion matrix of {name}: rows are true classes", ["true class", *names], rows)
    else:
        table = _frequent(name, values)
    right, total = sum(counts[i][i] for i in range(len(names))), sum(map(sum, counts))
    description = f"Confusion matrix of {name}: {right:,} of {total:,} predictions are on the diagonal."
    counted = len(names) <= COUNTED
    return Plot(f"{name}: confusion matrix", plots.confusion(values, names, counted), description, table, width=460)


def _is_matrix(value: Any) -> TypeGuard[list[list[Any]]]:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        return False
    return all(len(row) == len(value) and all(figures.is_number(n) for n in row) for row in value)


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with a number after names that occur several times, because a plot identifies rows by name."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _frequent(name: str, values: Sequence[Record]) -> Table:
    wrong = [v for v in values if v["true"] != v["predicted"] and v["count"]]
    wrong.sort(key=lambda v: -v["count"])
    rows = [[cell(v["true"]), cell(v["predicted"]), number(v["count"])] for v in wrong[:MOST_PAIRS]]
    return Table(f"Most frequent confusions of {name}", ["true class", "predicted class", "examples"], rows)


def calibration(name: str, metrics: Record) -> Plot | None:
    """Return the plot of accuracy against confidence, or None if the metrics have no reliability table."""
    bins = metrics.get("reliability")
    if not isinstance(bins, list) or not bins:
        return None
    if not all(isinstance(b, list) and len(b) == 3 and all(map(figures.is_number, b)) for b in bins):
        return None
    values: list[Record] = [dict(zip(("count", "confidence", "accuracy"), b, strict=True)) for b in bins]
    rows = [
        [*(number(v[key], f"{v[key]:.1%}") for key in ("confidence", "accuracy")), number(v["count"])] for v in values
    ]
    table = Table(f"Calibration of {name}, per bin of confidence", ["mean confidence", "accuracy", "examples"], rows)
    error = metrics.get("ece")
    said = f", expected calibration error {error:.3f}" if figures.is_number(error) else ""
    description = f"Accuracy against confidence of {name}, on the diagonal if calibrated{said}."
    return Plot(f"{name}: calibration{said}", plots.reliability(values), description, table, width=460)
