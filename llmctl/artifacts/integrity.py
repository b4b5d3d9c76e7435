"""Find differences between an artifact's files and the digests in its manifest, with or without reading the arrays.

Example:
    >>> quick_check(folder, read_manifest(folder)).content, full_check(folder).content
    ({}, {})
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl.artifacts import adapters, artifact
from llmctl.artifacts.atomic import size
from llmctl.artifacts.manifest import NAME, Manifest
from llmctl.artifacts.manifest_file import damaged_fields, damaged_files, listed, read_manifest
from llmctl.config.errors import LlmctlError, RequestError

OLDER = "saved by an earlier llmctl, so only its arrays and its tokenizer are checked"


@dataclass(frozen=True)
class Damage:
    """Store the differences between an artifact and its manifest, as {name of the field or file: message}."""

    content: dict[str, str]
    """Differences that can change predictions. An artifact with such a difference cannot be loaded."""
    record: dict[str, str]
    """Differences that cannot change predictions: in metrics, parents, sizes and logs."""


def quick_check(path: Path, manifest: Manifest, bases: Sequence[Path] = ()) -> Damage:
    """Return the differences between an artifact and its manifest, without reading the arrays.

    Files and fields are compared with their checksums. For the arrays, only the total size on disk is compared, and not
    the values. The base of an adapter is checked as well.

    Args:
        path: Folder of the artifact.
        manifest: Manifest of the artifact.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.
    """
    content = damaged_files(path, manifest, "content")
    if manifest.weights and size(path / "params") != manifest.bytes:
        content["params"] = "params has another size on disk than was saved"
    if manifest.base:
        content |= _base_damage(path, manifest, bases)
    return Damage(content, damaged_fields(path, "record") | damaged_files(path, manifest, "record"))


def _base_damage(path: Path, manifest: Manifest, bases: Sequence[Path]) -> dict[str, str]:
    """Return {"base": message} if the base of an adapter is missing or damaged, else {}."""
    try:
        folder = adapters.find_base(path, manifest, bases)
        found = quick_check(folder, read_manifest(folder), [b for b in bases if Path(b) != folder])
    except RequestError as e:
        return {"base": str(e).removeprefix(f"{path}: ")}
    wrong = listed(found.content.values())
    return {"base": f"its base {folder} is damaged: {wrong}"} if wrong else {}


def full_check(path: Path, bases: Sequence[Path] = ()) -> Damage:
    """Return the differences between an artifact and its manifest, including differences in the arrays.

    The arrays are read once, sharded over the default mesh. The arrays are not read if the files and fields already
    have differences that can change predictions. The base of an adapter is read as well.

    Args:
        path: Folder of the artifact.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.

    Raises:
        RequestError: If the manifest is missing, is damaged or has a later format.
    """
    manifest = read_manifest(path)
    found = quick_check(path, manifest, bases)
    if manifest.weights and not found.content:
        try:
            artifact.load(path, bases=bases)
        except RequestError as e:
            found.content["params"] = reason(e, path)
    return found


def reason(e: LlmctlError, path: Path) -> str:
    """Return the message of an error about the artifact `path`, without the path and the advice after its last "; "."""
    line = str(e).removeprefix(f"{path}: ").removeprefix(f"{path / NAME}: ")
    line = line.rpartition("; ")[0] or line
    return line[len("damaged (") : -1] if line.startswith("damaged (") else line
