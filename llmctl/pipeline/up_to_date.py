"""Determine whether a stage's artifact is up to date: same settings, same inputs, and unchanged files.

An artifact stores its key: a hash of the settings and inputs of the stage that wrote the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import artifact, integrity
from llmctl.artifacts.manifest_file import listed
from llmctl.config.base import keyed
from llmctl.config.errors import LlmctlError
from llmctl.pipeline.recipe import MANIFEST

if TYPE_CHECKING:
    from llmctl.artifacts.manifest import Manifest
    from llmctl.pipeline.recipe import Step


def why(step: Step, key: str, due: set[str]) -> str:
    """Return why the stage has to run, as a clause for messages. If its artifact is up to date, return "".

    Args:
      step: the stage.
      key: hash of the stage's settings and inputs.
      due: names of the earlier stages that have to run.
    """
    if not (step.out / MANIFEST).exists():
        return "new"
    try:
        manifest = artifact.read_manifest(step.out)
    except LlmctlError as e:
        return f"the artifact that is there cannot be read ({integrity.reason(e, step.out)})"
    if wrong := _damage(step, manifest):
        return f"the artifact that is there is damaged ({wrong})"
    if manifest.key == key:
        return "measured again" if getattr(step.config, "again", False) else ""
    before, now = _leaves(manifest.config), _leaves(keyed(step.config))
    changed = [f"{k} {before[k]} → {v}" for k, v in now.items() if k in before and before[k] != v]
    changed += [f"{k} {'is new' if k in now else 'is gone'}" for k in sorted(before.keys() ^ now.keys())]
    if changed:
        return "changed: " + ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    above = [a for a in (step.parent, *step.others.values()) if isinstance(a, str) and a in due]
    return f"{above[0]} is made anew" if above else "its input changed"


def is_done(step: Step, key: str) -> bool:
    """Return whether the stage's artifact is intact and was made from these settings and inputs (`key`).

    The runner calls this function again before a stage runs. Another process may have written the artifact in the
    meantime.
    """
    again = getattr(step.config, "again", False)
    return not again and key_at(step.out) == key and not _damage(step, artifact.read_manifest(step.out))


def remark(step: Step) -> str:
    """Return a remark in parentheses on an artifact that is up to date. If there is no remark, return "".

    There is a remark if metrics or lineage differ from their checksums. There is also a remark if an earlier version of
    llmctl wrote the artifact.
    """
    manifest = artifact.read_manifest(step.out)
    if manifest.checksums is None:
        return f" ({integrity.OLDER})"
    wrong = integrity.quick_check(step.out, manifest, _bases(step)).record
    return f" ({listed(wrong.values())}; its weights are whole)" if wrong else ""


def key_at(folder: Path) -> str:
    """Return the hash of settings and inputs that the artifact in a folder stores. If the hash cannot be read, return
    ""."""
    try:
        return artifact.read_manifest(folder).key
    except LlmctlError:
        return ""


def _bases(step: Step) -> tuple[Path, ...]:
    """Return the folders outside the run that may contain the base of the stage's artifact.

    Only an adapter has a base. For other artifacts, the folders are not searched.
    """
    return (*((step.parent,) if isinstance(step.parent, Path) else ()), *step.config.bases)


def _damage(step: Step, manifest: Manifest) -> str:
    """Return why an artifact must be created again, as a clause for messages. If a quick check finds no damage, return
    "".

    Arrays are checked later, when they are loaded. An adapter must be created again if its base is gone or was
    replaced. If only the metrics or the lineage differ from their checksums, a model is kept, and `remark` reports the
    difference. A report of `eval` contains only metrics, so a report that differs is created again.
    """
    found = integrity.quick_check(step.out, manifest, _bases(step))
    again = not manifest.weights or "key" in found.record
    return listed((found.content | (found.record if again else {})).values())


def _leaves(values: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(values, dict):
        return {k: v for name, value in values.items() for k, v in _leaves(value, f"{prefix}{name}.").items()}
    return {prefix[:-1]: json.dumps(values)}
