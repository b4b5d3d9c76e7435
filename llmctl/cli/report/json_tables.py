"""Show JSON data of any structure as tables, such as the reports of stages and the nested results of evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.cli.report import figures
from llmctl.cli.report.document import Block, Cell, Paragraph, Table, cell, number

MOST_ROWS = 300
"""Maximum number of rows per table. A paragraph states the number of omitted rows."""
MOST_COLUMNS = 40
LONGEST = 400
"""Maximum number of characters of a value that is neither a number nor a short text."""


def blocks(values: Mapping[str, Any]) -> list[Block]:
    """Return one table for all plain values, and one table per list or object.

    Example:
        >>> made = blocks({"steps": 3, "layers": [{"layer": 0, "error": 0.5}, {"layer": 1}]})
        >>> [(table.caption, table.headings) for table in made]
        [('Values', ['name', 'value']), ('layers', ['layer', 'error'])]
    """
    flat = {name: value for name, value in values.items() if not isinstance(value, (dict, list))}
    found: list[Block] = [_pairs("Values", flat)] if flat else []
    for name, value in values.items():
        if isinstance(value, (dict, list)) and value:
            found += _nested(words(name), value)
    return found


def words(name: str) -> str:
    """Return a JSON key as words."""
    return cell(name.replace("_", " ")).text


def _nested(name: str, value: dict[str, Any] | list[Any]) -> list[Block]:
    if isinstance(value, dict):
        if all(isinstance(v, dict) for v in value.values()):
            return _records(name, [{"": key, **inner} for key, inner in value.items()])
        plain = {k: v for k, v in value.items() if not isinstance(v, (dict, list)) or _is_short(v)}
        found: list[Block] = [_pairs(name, plain)] if plain else []
        for key, inner in value.items():
            if key not in plain and inner:
                found += _nested(f"{name}: {words(key)}", inner)
        return found
    if all(isinstance(v, dict) for v in value):
        return _records(name, value)
    return _records(name, [{"": i, "value": v} for i, v in enumerate(value)])


def _is_short(value: Any) -> bool:
    return isinstance(value, list) and all(not isinstance(v, (dict, list)) for v in value) and len(value) <= 12


def _pairs(caption: str, values: Mapping[str, Any]) -> Table:
    return Table(caption, ["name", "value"], [[cell(words(k)), json_cell(v, k)] for k, v in values.items()])


def _records(name: str, records: Sequence[Mapping[str, Any]]) -> list[Block]:
    keys = list(dict.fromkeys(key for record in records for key in record))[:MOST_COLUMNS]
    head = [words(key) or "name" for key in keys]
    rows = [[json_cell(record.get(key), key) for key in keys] for record in records[:MOST_ROWS]]
    left = len(records) - MOST_ROWS
    more: list[Block] = [Paragraph(f"{left:,} further rows are in the JSON data.")] if left > 0 else []
    return [Table(name, head, rows), *more]


def json_cell(value: Any, name: str = "") -> Cell:
    """Return the cell of a JSON value. If a metric called `name` is registered, a number is formatted like this
    metric."""
    if figures.is_number(value):
        return number(value, figures.value_text(name, value) if name and figures.record(name) else "")
    if value is None:
        return number(None)
    if isinstance(value, bool):
        return cell("yes" if value else "no")
    text = value if isinstance(value, str) else _compact(value)
    return cell(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


def _compact(value: Any) -> str:
    """Format a list or object in one line."""
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_compact(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_compact(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
