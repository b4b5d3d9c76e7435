"""Compare artifacts, runs and prepared data with the checksums that were saved with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import artifact, integrity
from llmctl.config.errors import RequestError
from llmctl.pipeline.recipe import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Entry = dict[str, Any]


def run(path: Path, say: Callable[[str], None], bases: Sequence[Path] = ()) -> list[Entry]:
    """Compare the artifact, the run or the prepared data at a path with the checksums that were saved with it.

    Args:
      path: an artifact, the folder of a run, or prepared data.
      say: function that prints one line per artifact before the artifact is read.
      bases: folders of base artifacts, for adapters whose base is not in a folder next to the adapter.

    Returns:
      One record per artifact or prepared data: {"path", "kind", "state", "digest", "content", "differences", "notes"}.
      The state is "intact", "damaged" or "unchecked in part". The state is "unchecked in part" if an earlier version of
      llmctl saved the artifact.

    Raises:
      RequestError: If the path contains no artifact, no run and no prepared data.
    """
    from llmctl.data.pretraining.prepared import DESCRIPTION

    if (path / MANIFEST).exists():
        return [_artifact(path, say, bases)]
    if (path / DESCRIPTION).exists():
        return [_prepared(path, say)]
    inside = sorted(p.parent for p in path.glob(f"[!.]*/{MANIFEST}"))
    if not inside:
        raise RequestError(
            f"{path}: neither an artifact, nor a run, nor prepared data: there is no {MANIFEST} or {DESCRIPTION}"
        )
    found = [_artifact(folder, say, bases) for folder in inside]
    _compare_parents(found)
    return found


def _artifact(path: Path, say: Callable[[str], None], bases: Sequence[Path]) -> Entry:
    say(f"reading {path}")
    entry: Entry = {"path": str(path), "kind": "artifact", "state": "intact", "digest": "", "content": ""}
    entry |= {"differences": [], "notes": []}
    try:
        manifest = artifact.read_manifest(path)
        found = integrity.full_check(path, bases)
    except RequestError as e:
        return entry | {"state": "damaged", "differences": [integrity.reason(e, path)]}
    entry |= {"digest": manifest.digest, "content": manifest.content}
    entry["parent"] = manifest.parent.model_dump() if manifest.parent else None
    entry["differences"] = [*found.content.values(), *found.record.values()]
    if entry["differences"]:
        entry["state"] = "damaged"
    elif manifest.checksums is None:
        entry |= {"state": "unchecked in part", "notes": [integrity.OLDER]}
    return entry


def _compare_parents(found: list[Entry]) -> None:
    """Add a note to each artifact whose parent was replaced by a different artifact with the same name."""
    by_name = {Path(entry["path"]).name: entry["content"] for entry in found}
    for entry in found:
        parent = entry.get("parent")
        there = by_name.get(parent["name"], "") if parent else ""
        if parent and there and parent["content"] and parent["content"] != there:
            entry["notes"].append(f"was made from another {parent['name']} than the one that is there")


def _prepared(path: Path, say: Callable[[str], None]) -> Entry:
    from llmctl.data.pretraining import prepared

    say(f"reading {path}")
    entry: Entry = {"path": str(path), "kind": "prepared data", "state": "intact", "digest": "", "content": ""}
    entry |= {"differences": [], "notes": []}
    try:
        where, found = prepared.read(str(path))
    except RequestError as e:
        return entry | {"state": "damaged", "differences": [integrity.reason(e, path)]}
    entry["digest"] = found.digest
    entry["differences"] = list(prepared.damage(where, found).values())
    if entry["differences"]:
        entry["state"] = "damaged"
    elif found.words is None:
        entry |= {
            "state": "unchecked in part",
            "notes": ["prepared by an earlier llmctl, so only its shards are checked"],
        }
    return entry
