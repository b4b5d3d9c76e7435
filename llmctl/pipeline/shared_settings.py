"""Give each stage of a recipe the shared settings that its config class defines."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from llmctl.config.base import Config, hint, section
from llmctl.config.errors import RequestError
from llmctl.pipeline import stage

if TYPE_CHECKING:
    from llmctl.pipeline.stage import StageConfig


def of_stages(doc: dict[str, Any], classes: list[type[StageConfig]], file: str) -> list[dict[str, Any]]:
    """Return, for each stage, the shared settings that its config class defines.

    Raises:
      RequestError: If a shared setting is defined by no stage.
    """
    shared = {k: v for k, v in doc.items() if k not in ("name", "run", "stage")}
    used: set[str] = set()
    found = [_settings_of(cls, shared, used) for cls in classes]
    _check_all_used(shared, used, classes, [t.get("name", t["kind"]) for t in doc["stage"]], file)
    return found


def shareable(cls: type[Config]) -> list[str]:
    """Return the keys of `cls` that a recipe may set for all of its stages."""
    unshared = cls.unshared if issubclass(cls, stage.StageConfig) else ()
    return [f.alias or name for name, f in cls.model_fields.items() if name not in unshared]


def _settings_of(cls: type[Config], shared: dict[str, Any], used: set[str], prefix: str = "") -> dict[str, Any]:
    """Return the shared settings that the config class `cls` defines, and add their paths to `used`."""
    out: dict[str, Any] = {}
    for key, value in shared.items():
        if key not in shareable(cls):
            continue
        inner = section(cls, key)
        if inner and isinstance(value, dict):
            used.add(prefix + key)
            out[key] = _settings_of(inner, value, used, f"{prefix}{key}.")
        else:
            used.update(paths({key: value}, prefix))
            out[key] = copy.deepcopy(value)
    return out


def _check_all_used(
    shared: dict[str, Any], used: set[str], classes: list[type[StageConfig]], names: list[str], file: str
) -> None:
    """Check that each shared setting is used by at least one stage.

    Raises:
      RequestError: If a shared setting is used by no stage.
    """
    for path in paths(shared):
        if path in used:
            continue
        above, _, key = path.rpartition(".")
        known: set[str] = {"name", "run", "stage"} if not above else set()
        for cls in classes:
            at: type[Config] | None = cls
            for part in above.split(".") if above else []:
                at = section(at, part) if at else None
            known |= set(shareable(at)) if at else set()
        near = f", did you mean 'stage.{path}'?" if path in names else hint(key, sorted(known))
        raise RequestError(f"{file}: {path}: unknown key, no stage of this recipe has it{near}")


def paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted path of every key of nested settings."""
    out = []
    for key, value in values.items():
        out.append(prefix + key)
        if isinstance(value, dict):
            out += paths(value, f"{prefix}{key}.")
    return out
