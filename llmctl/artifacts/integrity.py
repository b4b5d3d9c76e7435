"""Compare artifacts with the digests in their manifest, with or without the arrays.

Example:
    >>> quick(folder, read_manifest(folder)).content, complete(folder).content
    ({}, {})
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmctl.artifacts import artifact
from llmctl.artifacts.atomic import size
from llmctl.artifacts.manifest import NAME, Manifest, damaged_fields, damaged_files, read_manifest
from llmctl.config.errors import LlmctlError, RequestError

OLDER = "saved by an earlier llmctl, so only its arrays and its tokenizer are checked"


@dataclass(frozen=True)
class Damage:
    """List the differences between an artifact and its manifest: messages by the name of the field or file."""

    content: dict[str, str]
    """Differences that can change predictions. An artifact with such a difference cannot be loaded."""
    record: dict[str, str]
    """Differences in metrics, parents, sizes and logs, which cannot change predictions."""


def quick(path: Path, manifest: Manifest) -> Damage:
    """Compare the files and fields of an artifact with its manifest. Of arrays, compare only the size on disk."""
    content = damaged_files(path, manifest, "content")
    if manifest.weights and size(path / "params") != manifest.bytes:
        content["params"] = "params has another size on disk than was saved"
    return Damage(content, damaged_fields(path, "record") | damaged_files(path, manifest, "record"))


def complete(path: Path) -> Damage:
    """Compare the files, fields and arrays of an artifact with its manifest.

    The arrays are read once, sharded over the default mesh.

    Raises:
        RequestError: If the manifest is missing, is damaged or has a later format.
    """
    manifest = read_manifest(path)
    found = quick(path, manifest)
    if manifest.weights and not found.content:
        try:
            artifact.load(path)
        except RequestError as e:
            found.content["params"] = reason(e, path)
    return found


def reason(e: LlmctlError, path: Path) -> str:
    """Return the cause from an error message about `path`, without the path and the advice."""
    line = str(e).removeprefix(f"{path}: ").removeprefix(f"{path / NAME}: ")
    line = line.rpartition("; ")[0] or line
    return line[len("damaged (") : -1] if line.startswith("damaged (") else line
