"""Validate settings, and report an invalid setting in one line.

An error message has the file, the dotted path of the setting, and the problem. If a setting is unknown, the message
suggests a setting with a similar name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError

from llmctl.config.base import Config, config_in, field_names, hint, merge, section, shown
from llmctl.config.errors import RequestError

C = TypeVar("C", bound=Config)


def validate(cls: type[C], values: dict[str, Any], place: Callable[[str], str]) -> C:
    """Validate settings, and return them as an instance of `cls`.

    Types are strict ("3" is no integer, and true is not 1). Unknown keys are errors.

    Args:
        cls: Settings class.
        values: Nested dicts and lists, as read from TOML.
        place: Function that returns the beginning of an error message, such as `demo.toml: stage.2.train.steps (prune)`
            or `--train.steps`. Its argument is the dotted path of the invalid value inside `values`, such as
            `train.steps`. If the error concerns all values, the path is empty.

    Raises:
        RequestError: If a value is invalid or a key is unknown. The message is one line.
    """
    try:
        # The JSON mode is strict, but it accepts a list for a tuple and a string for a path.
        return cls.model_validate_json(json.dumps(_filled(cls, values), default=str), strict=True)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        # A misspelt key often causes a second error elsewhere, so report the key first.
        first = next((x for x in errors if x["type"] == "extra_forbidden"), errors[0])
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        place_of_first = place(".".join(str(part) for part in first["loc"]))
        raise RequestError(f"{place_of_first}: {_explain(cls, first)}{more}") from None


def _filled(cls: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Complete nested settings that the user set only in part, with the defaults that `cls` declares for them.

    If `cls` declares `train: TrainConfig = TrainConfig(steps=300)` and the user sets only `train.batch_size`, the
    number of steps is 300.

    There is one exception: nested settings with `deciding` fields, such as a preset. These fields determine the
    defaults of all other fields. If the user set a deciding field, no field is completed. Otherwise, only the deciding
    fields are completed.
    """
    out = dict(values)
    for name, field in cls.model_fields.items():
        key = field.alias or name
        inner, default = section(cls, key), field.get_default(call_default_factory=True)
        if not inner or not isinstance(out.get(key), dict):
            continue
        below: dict[str, Any] = {}
        if isinstance(default, inner) and not any(k in out[key] for k in inner.deciding):
            told = set(inner.deciding) or default.model_fields_set
            below = default.model_dump(mode="json", by_alias=True, include=told & default.model_fields_set)
        out[key] = _filled(inner, merge(below, out[key], inner))
    return out


def _class_at(cls: type[Config], path: tuple[Any, ...]) -> type[Config] | None:
    """Return the settings class of the value at `path` inside `cls`, or None if the value has another type.

    Args:
        cls: Class of the outermost settings.
        path: Location of the value as pydantic reports it: keys, list indices and names of union members. Only the keys
            are used.
    """
    at: type[Config] | None = cls
    for part in path:
        if not isinstance(part, str) or at is None:
            continue
        found = next((f.annotation for n, f in at.model_fields.items() if part in (n, f.alias)), None)
        if found is None:
            continue  # the name of a union's branch
        at = config_in(found) or next((c for a in get_args(found) if (c := config_in(a))), None)
    return at


def _explain(cls: type[Config], error: Any) -> str:
    loc, kind, given, ctx = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        at = _class_at(cls, loc[:-1])
        known = field_names(at) if at else []
        return f"unknown key{hint(str(loc[-1]), known) or (': known are ' + ', '.join(known) if known else '')}"
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(ctx.get("error", error["msg"]))
    if kind == "literal_error":
        at, allowed = _class_at(cls, loc[:-1]), []
        field = next((f for n, f in (at or cls).model_fields.items() if loc[-1] in (n, f.alias)), None)
        if field and get_origin(field.annotation) is Literal:
            allowed = [a for a in get_args(field.annotation) if isinstance(a, str)]
        return f"must be {ctx['expected']}, got {shown(given)}{hint(str(given), allowed)}"
    expected = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "a string",
        "bool_type": "true or false",
        "list_type": "a list",
        "tuple_type": "a list",
        "dict_type": "a table",
        "model_type": "a table",
        "path_type": "a path",
        "greater_than": f"> {ctx.get('gt')}",
        "greater_than_equal": f">= {ctx.get('ge')}",
        "less_than": f"< {ctx.get('lt')}",
        "less_than_equal": f"<= {ctx.get('le')}",
    }.get(kind)
    if expected:
        return f"must be {expected}, got {shown(given)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {shown(given)}"
