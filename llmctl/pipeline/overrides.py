"""Apply `--set` assignments, such as `stage.2.sparsity=0.6` or `train.epochs=2`, to a recipe or to one stage.

Some settings exclude each other, such as `train.steps` and `train.epochs`. An assignment to one setting removes the
settings that this setting excludes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmctl.config.base import Config, assign, excluded, hint, parse_value, section
from llmctl.config.errors import RequestError
from llmctl.config.text_input import DEPTH
from llmctl.pipeline import shared_settings, stage

if TYPE_CHECKING:
    from llmctl.pipeline.stage import StageConfig


def assign_to(doc: dict[str, Any], text: str) -> None:
    """Apply an assignment to the tables of a recipe, in place.

    A path that starts with `stage` changes one stage. Any other path changes a shared setting, and also the same
    setting in stages whose tables override it.

    Raises:
      RequestError: If the assignment is malformed, or no stage has this index or name.
    """
    path, value = _assignment(text)
    given = doc.get("stage", [])
    tables: list[Any] = given if isinstance(given, list) else []
    if path[0] != "stage":
        assign(doc, path, value)
        for table in tables:
            cls = _class(table)
            if cls and path[0] in shared_settings.shareable(cls):
                void = _excluded(path, value, cls)
                _drop(doc, void)
                if not {".".join(p) for p in (path, *void)}.isdisjoint(shared_settings.paths(table)):
                    _replace(table, path, value, cls)
        return
    if len(path) < 3 or not isinstance(given, list):
        raise RequestError(f"--set {text}: say which stage and which key, such as stage.0.train.steps=10")
    known = [str(t.get("name") or t.get("kind")) for t in tables if isinstance(t, dict)]
    which = path[1]
    at = int(which) if re.fullmatch(r"[0-9]{1,9}", which) else known.index(which) if which in known else -1
    if not 0 <= at < len(tables):
        raise RequestError(
            f"--set {text}: no stage {which}{hint(which, known)}; there are 0 to {len(tables) - 1}: {', '.join(known)}"
        )
    _replace(tables[at], path[2:], value, _class(tables[at]))


def assign_in(values: dict[str, Any], text: str, cls: type[Config]) -> None:
    """Apply an assignment to the settings of one stage, in place.

    Raises:
      RequestError: If the assignment is malformed.
    """
    path, value = _assignment(text)
    _replace(values, path, value, cls)


def _class(table: Any) -> type[StageConfig] | None:
    """Return the config class of a `[[stage]]` table; None if the kind in the table is unknown."""
    kind = table.get("kind", "") if isinstance(table, dict) else ""
    return stage.load(kind).Config if kind in stage.kinds() else None


def _replace(values: dict[str, Any], path: list[str], value: Any, cls: type[Config] | None) -> None:
    """Set the value at a path in `values`, and remove the settings that this setting excludes.

    `cls` is the config class of the settings; None if it is unknown.
    """
    assign(values, path, value)
    _drop(values, _excluded(path, value, cls) if cls else [])


def _excluded(path: list[str], value: Any, cls: type[Config]) -> list[list[str]]:
    """Return the paths of the settings that must be removed if `path` is set to `value`."""
    at: type[Config] | None = cls
    for part in path[:-1]:
        at = section(at, part) if at else None
    return [[*path[:-1], other] for other in sorted(excluded({path[-1]: value}, at))] if at else []


def _drop(values: dict[str, Any], paths: list[list[str]]) -> None:
    for *above, key in paths:
        table: Any = values
        for part in above:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            table.pop(key, None)


def _assignment(text: str) -> tuple[list[str], Any]:
    path, equals, value = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or len(parts) > DEPTH:
        raise RequestError(f"--set {text}: must look like stage.2.sparsity=0.6")
    return parts, parse_value(value.strip())
