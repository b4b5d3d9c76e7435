"""Format the metrics of artifacts as cells of tables: title, rounded text, exact value and interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from llmctl.cli.report.document import Cell, Number, cell, number
from llmctl.config.terminal import visible
from llmctl.evaluate.metrics.base import METRICS, Metric, find, text

ENDS = ("low", "high")


def is_number(value: Any) -> TypeGuard[Number]:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def split(name: str) -> tuple[str, str]:
    """Split the full name of a metric into (task, metric). The task is empty if the name does not begin with a task.

    Example:
        >>> split("accuracy/gender"), split("bbq/accuracy/gender"), split("bbq/nothing")
        (('', 'accuracy/gender'), ('bbq', 'accuracy/gender'), ('bbq', 'nothing'))
    """
    parts = name.split("/")
    first = next((i for i in range(len(parts)) if find("/".join(parts[i:]))), len(parts) - 1)
    return "/".join(parts[:first]), "/".join(parts[first:])


def record(name: str) -> Metric | None:
    """Return the registered metric of a name, which may begin with a task (`task/metric`)."""
    return find(split(name)[1])


def title(name: str) -> str:
    """Return the title of a metric. If the metric is not registered, the title is its name with spaces for underscores.

    Example:
        >>> title("bbq/accuracy/gender"), title("new_metric")
        ('bbq: accuracy (gender)', 'new metric')
    """
    task, bare = split(name)
    known = find(bare)
    words = known.title if known else bare.replace("_", " ")
    return visible(f"{task}: {words}" if task else words)


def value_text(name: str, value: Number) -> str:
    """Format the value of a metric as the tables of `llmctl show` do. Whole numbers keep all their digits."""
    known = record(name)
    if known is None and isinstance(value, int):
        return f"{value:,}"
    return known.text(value) if known else text(name.rpartition("/")[2], value)


def interval(metrics: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric, or None if it has no interval."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return (low, high) if is_number(low) and is_number(high) else None


def metric_cell(metrics: Mapping[str, Any], name: str) -> Cell:
    """Return the cell of a metric, with its interval as the note; a dash if the metric is missing."""
    value = metrics.get(name)
    if not is_number(value):
        return number(None) if value is None else cell(value)
    ends = interval(metrics, name)
    note = f"{value_text(name, ends[0])} to {value_text(name, ends[1])}" if ends else ""
    return number(value, value_text(name, value), note)


def scalars(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics that are numbers. The bounds of an interval are omitted if its metric is
    present."""
    names = [name for name, value in metrics.items() if is_number(value)]
    ends = {f"{name}_{end}" for name in names for end in ENDS}
    return [name for name in names if name not in ends]


def ordered(names: Iterable[str]) -> list[str]:
    """Return metric names without duplicates: registered metrics in the order of the registry, then the others."""
    order = {name: i for i, name in enumerate(METRICS)}
    return sorted(dict.fromkeys(names), key=lambda name: order.get(name, len(order)))


def is_ratio(name: str, values: Iterable[float]) -> bool:
    """Return whether a metric has no unit, and all its values are between -1 and 1."""
    known = record(name)
    return (known is None or not known.unit) and all(-1 <= value <= 1 for value in values)
