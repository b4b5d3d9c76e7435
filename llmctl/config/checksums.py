"""Compute SHA-256 checksums of JSON values, of files, and of all files of a folder.

Example:
  >>> of_json({"b": 1, "a": [2]}) == of_json({"a": [2], "b": 1})
  True
  >>> len(of_json("text"))
  64
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
"""Number of bytes to read from a file at a time."""


def of_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value as hex digits. The order of keys in objects does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Any) -> str:
    """Return the SHA-256 of a file's content as hex digits. The path may be remote (`etils.epath`)."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def of_folder(folder: Any) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, as {relative path: hex digits}; {} if there is no folder."""
    return {name: of_file(path) for name, path in _files(folder).items()}


def differing(folder: Any, expected: Mapping[str, str]) -> dict[str, str]:
    """Compare the files below a folder with their expected checksums.

    Files whose names begin with a dot are ignored, unless `expected` lists them.

    Returns:
        {relative path: message} for the files that differ. A message is the path and "does not match what was saved",
        "is missing", or "was not saved with it".
    """
    found = {n: p for n, p in _files(folder).items() if n in expected or not n.rpartition("/")[2].startswith(".")}
    wrong = dict.fromkeys(expected.keys() - found.keys(), "is missing")
    wrong |= dict.fromkeys(found.keys() - expected.keys(), "was not saved with it")
    for name in expected.keys() & found.keys():
        if not found[name].is_file() or of_file(found[name]) != expected[name]:
            wrong[name] = "does not match what was saved"
    return {name: wrong[name] for name in sorted(wrong)}


def _files(folder: Any) -> dict[str, Any]:
    """Return the files below a folder as {relative path with slashes: path}.

    Links to folders are not followed.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        inside = path.is_dir() and not Path(path).is_symlink()
        found |= {f"{path.name}/{n}": p for n, p in _files(path).items()} if inside else {path.name: path}
    return found
