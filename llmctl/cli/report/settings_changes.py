"""Find the settings of a stage that differ from their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.config.base import Config, config_in, keyed
from llmctl.config.errors import RequestError
from llmctl.config.validation import validate
from llmctl.pipeline import stage


def changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a manifest's `config` that differ from the defaults of the stage, as nested tables.

    If the kind of the config is not that of a stage, such as for imports, all settings are returned.

    Example:
        >>> changes({"kind": "quantize", "seed": 0, "bits": 4})
        {'bits': 4}
        >>> changes({"kind": "distill", "teacher": "base", "divergence": "total_variation", "temperature": 2.0})
        {'teacher': 'base', 'divergence': 'total_variation', 'temperature': 2.0}
    """
    kind = config.get("kind")
    if kind not in stage.kinds():
        return dict(config)
    values, cls = {k: v for k, v in config.items() if k != "kind"}, stage.load(str(kind)).Config
    found = _different(values, cls)
    try:
        again = keyed(validate(cls, {"kind": kind, **found}, str))
    except RequestError:
        return found
    # A default may depend on another setting: that of `distill`'s temperature depends on the divergence.
    return found | {k: v for k, v in values.items() if again.get(k, v) != v}


def _different(values: Mapping[str, Any], cls: type[Config], given: Config | None = None) -> dict[str, Any]:
    """Return the `values` that differ from `given` or, if `given` is None, from the defaults of the class."""
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if name not in values:
            continue
        value, inner = values[name], config_in(field.annotation)
        if given is not None:
            default = getattr(given, name)
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
        written = field.alias or name
        if inner and isinstance(value, dict):
            start = default if isinstance(default, inner) else None
            below = _different(value, inner, start)
            if inner.deciding and below and not _is_complete(value, below, inner, start):
                own = {k: inner.model_fields[k].get_default() for k in inner.deciding}
                below = own | _different(value, inner)
                if not _is_complete(value, below, inner, start):
                    below = dict(value)
            if below or default is None:
                found[written] = below
        elif keyed(default) != value or (field.is_required() and given is None):
            found[written] = value
    return found


def _is_complete(values: Mapping[str, Any], chosen: dict[str, Any], cls: type[Config], given: Config | None) -> bool:
    """Return whether the settings `chosen` determine all of `values`.

    A config of class `cls` is created from these settings, and compared with `values`. The deciding settings of `given`
    (`cls.deciding`), such as a preset, are added first. They determine the defaults of the other settings.
    """
    told = {k: getattr(given, k) for k in cls.deciding if given is not None and k in given.model_fields_set}
    try:
        return keyed(validate(cls, told | chosen, str)) == values
    except RequestError:
        return False


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables as {dotted name: value}.

    Example:
        >>> flat({"train": {"steps": 3}, "bits": 4})
        {'train.steps': 3, 'bits': 4}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{name}.{inner}": v for inner, v in flat(value).items()}
        else:
            found[name] = value
    return found
