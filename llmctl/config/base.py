"""Define `Config`, the base class of all settings, and read and write settings as TOML.

A setting is a field of a settings class. Its name, type, default and help text are defined only there.
`llmctl.config.validation` validates settings.
"""

from __future__ import annotations

import copy
import difflib
import json
import types
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, field_validator

from llmctl.config.errors import RequestError
from llmctl.config.limits import RECIPE
from llmctl.config.text_input import parse_toml

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
    """Heading above the fields of this class in a command's help. If empty, the fields are listed under the heading of
    the enclosing settings class."""
    common: ClassVar[tuple[str, ...] | None] = None
    """Names of the fields that a command's `--help` lists. None lists all fields. `--help-all` always lists all
    fields."""

    @field_validator("*")
    @classmethod
    def _representable(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > FLOAT32_MAX:
            raise ValueError(f"must be at most {FLOAT32_MAX:.3g}, the largest number in float32, got {value:g}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"must be a whole number of 64 bits, got {shown(value)}")
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
            return config_in(field.annotation)
    return None


def hint(word: str, known: list[str]) -> str:
    """Return ", did you mean …?" if a known word is similar to `word`, else an empty string."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def with_article(noun: str) -> str:
    """Return the noun with the article "a" or "an", chosen by the noun's first sound.

    Example:
        >>> with_article("encoder"), with_article("unigram"), with_article("gpu")
        ('an encoder', 'a unigram', 'a gpu')
    """
    return f"{'an' if noun[:1] in 'aeio' or (noun[:1] == 'u' and noun[:3] not in ('uni', 'use')) else 'a'} {noun}"


def keyed(value: Any) -> Any:
    """Convert a stage's settings to the JSON data from which its key (a hash) is computed.

    Fields in `Config.unkeyed` are omitted. A field in `Config.added` is omitted while it has its default. A new setting
    therefore does not change existing keys.

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


def config_in(annotation: Any) -> type[Config] | None:
    """Return the settings class in a type such as `MeshConfig | None`, or None if there is no settings class."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((c for a in get_args(annotation) if (c := config_in(a))), None)
    return None


def shown(value: Any) -> str:
    """Format a value as JSON for an error message, in at most 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
