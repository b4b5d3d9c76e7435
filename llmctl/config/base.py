"""Define `Config`, the base class of all settings, and read and validate settings from TOML.

A setting is a field of a settings class. Its name, type, default and help text are defined only there. An error message
is one line with the file, the dotted path of the setting, and the problem. If a setting is unknown, the message
suggests a setting with a similar name.
"""

from __future__ import annotations

import copy
import difflib
import json
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from llmctl.config.errors import RequestError
from llmctl.config.limits import RECIPE
from llmctl.config.text_input import parse_toml

if TYPE_CHECKING:
    from collections.abc import Callable

C = TypeVar("C", bound="Config")

FLOAT32_MAX = 2.0**128 - 2.0**104
"""Largest finite float32. Larger settings are rejected, because compiled programs convert settings to float32."""


class Config(BaseModel):
    """Define the base class of all settings classes, which are pydantic models.

    Instances are immutable, and unknown keys are errors. The docstrings of fields become the help texts of the command
    line.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        populate_by_name=True,
        allow_inf_nan=False,  # no setting means infinity
    )

    unkeyed: ClassVar[frozenset[str]] = frozenset()
    """Names of fields that cannot change a stage's result, such as the mesh. A stage is a step of a recipe, such as
    pretrain or prune. A stage's key, a hash of its settings, does not include these fields."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Names of fields that a later release added. A stage's key, a hash of its settings, includes such a field only if
    the value is not the default. Existing keys therefore stay valid."""
    deciding: ClassVar[tuple[str, ...]] = ()
    """Names of fields, such as a preset, that determine the defaults of the other fields of this class. If the user
    sets such a field, the field determines all defaults. Defaults that an enclosing settings class declares are then
    ignored."""
    exclusive: ClassVar[dict[str, str]] = {}
    """Pairs of fields that may not be set together, such as {"epochs": "steps"}. If the recipe file sets one field and
    the command line sets the other field, the command line takes precedence."""
    heading: ClassVar[str] = ""
    """Heading above these fields in a command's help. If empty, the fields are listed under the heading of the
    enclosing settings class."""
    common: ClassVar[tuple[str, ...] | None] = None
    """Names of the fields that a command's `--help` lists. None lists all fields. `--help-all` always lists all
    fields."""

    @field_validator("*")
    @classmethod
    def _representable(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > FLOAT32_MAX:
            raise ValueError(f"must be at most {FLOAT32_MAX:.3g}, the largest number in float32, got {value:g}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"must be a whole number of 64 bits, got {_shown(value)}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must hold no zero byte")
        return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file and return its content as a dict.

    Raises:
        RequestError: If the file is missing, unreadable, too large or not TOML. The message names the line.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:  # may be a pipe, which a shell makes for `<(…)`
            text = stream.read(RECIPE + 1)
        if len(text) > RECIPE:
            raise RequestError(f"{path}: has more than {RECIPE:,} bytes, so it is no recipe")
        return parse_toml(text.decode("utf-8"))
    except FileNotFoundError:
        there = [str(p) for p in file.parent.glob("*.toml")] if file.parent.is_dir() else []
        raise RequestError(f"{path}: no such file{hint(str(file), there)}") from None
    except ValueError as e:
        raise RequestError(f"{path}: not valid TOML: {e}") from None
    except OSError as e:
        raise RequestError(f"{path}: cannot be read: {e.strerror}") from None


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


def parse_value(text: str) -> Any:
    """Parse `text` as a TOML value (0.6, true, [1, 2], {a = 1}, "x"). If the syntax is invalid, return the text."""
    try:
        parsed = parse_toml(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def format_toml(value: Any) -> str:
    """Format `value` (JSON data) as TOML on one line. `parse_value` converts the line back."""
    if isinstance(value, dict):
        pairs = (
            f"{k if k.replace('_', 'a').isalnum() else json.dumps(k)} = {format_toml(v)}" for k, v in value.items()
        )
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(format_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set `values[path[0]][path[1]]… = value` in place, and create missing tables.

    Raises:
        RequestError: If an existing value on the path is not a table.
    """
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RequestError(f"{'.'.join(path)}: {part} is a value, not a table")
    values[path[-1]] = value


def merge(below: dict[str, Any], above: dict[str, Any], cls: type[Config]) -> dict[str, Any]:
    """Return the settings `below`, overridden by the settings `above`.

    If both arguments have a table for a field of nested settings, the two tables are merged key by key. Any other value
    in `above` replaces the value in `below`. If two fields may not be set together (`Config.exclusive`), the field that
    `above` sets removes the other field from `below`.
    """
    void = excluded(above, cls)
    out = copy.deepcopy({key: value for key, value in below.items() if key not in void})
    for key, value in above.items():
        inner = section(cls, key)
        if inner and isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value, inner)
        else:
            out[key] = copy.deepcopy(value)
    return out


def excluded(given: dict[str, Any], cls: type[Config]) -> set[str]:
    """Return the fields of `cls` that may not be set together with the settings `given` (`Config.exclusive`).

    An example is the pair {"epochs": "steps"}. If `steps` is set, `epochs` is returned. If `epochs` is set and is not
    0, `steps` is returned. The value 0 means that `epochs` is not set.
    """
    pairs = cls.exclusive.items()
    return {other for name, other in pairs if given.get(name)} | {name for name, other in pairs if other in given}


def field_names(cls: type[Config]) -> list[str]:
    """Return the names of the fields of `cls` in TOML.

    A name in TOML may differ from the name of the attribute: the attribute `parent` is called `from` in TOML.
    """
    return [f.alias or name for name, f in cls.model_fields.items()]


def section(cls: type[Config], key: str) -> type[Config] | None:
    """Return the type of the field `key` of `cls` if the type is a settings class, else None.

    For a type such as `MeshConfig | None`, return the settings class `MeshConfig`.
    """
    for name, field in cls.model_fields.items():
        if key in (name, field.alias):
            return _config_in(field.annotation)
    return None


def hint(word: str, known: list[str]) -> str:
    """Return ", did you mean …?" if a known word is similar to `word`, else an empty string."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def with_article(noun: str) -> str:
    """Return the noun with the article "a" or "an", chosen by its first sound.

    Example:
        >>> with_article("encoder"), with_article("unigram"), with_article("gpu")
        ('an encoder', 'a unigram', 'a gpu')
    """
    return f"{'an' if noun[:1] in 'aeio' or (noun[:1] == 'u' and noun[:3] not in ('uni', 'use')) else 'a'} {noun}"


def keyed(value: Any) -> Any:
    """Convert a stage's settings to the JSON data from which its key (a hash) is computed.

    Fields in `Config.unkeyed` are omitted. A field in `Config.added` is omitted while it has its default, so that a new
    setting does not change existing keys.

    Args:
        value: Settings, or a value inside settings.
    """
    if isinstance(value, Config):
        fields = type(value).model_fields
        unset = {k for k in value.added if getattr(value, k) == fields[k].get_default(call_default_factory=True)}
        return {k: keyed(getattr(value, k)) for k in fields if k not in value.unkeyed | unset}
    if isinstance(value, dict):
        return {str(k): keyed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [keyed(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(keyed(v) for v in value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _filled(cls: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Complete nested settings that the user set only in part, with the defaults that `cls` declares for them.

    If `cls` declares `train: TrainConfig = TrainConfig(steps=300)` and the user sets only `train.batch_size`, the
    number of steps is 300.

    Nested settings with `deciding` fields, such as a preset, are an exception. The deciding fields determine the
    defaults of the other fields. Only the deciding fields are completed, and only if the user set no deciding field.
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


def _config_in(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((c for a in get_args(annotation) if (c := _config_in(a))), None)
    return None


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
        at = _config_in(found) or next((c for a in get_args(found) if (c := _config_in(a))), None)
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
        return f"must be {ctx['expected']}, got {_shown(given)}{hint(str(given), allowed)}"
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
        return f"must be {expected}, got {_shown(given)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {_shown(given)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
