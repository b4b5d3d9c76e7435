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
"""Bytes of a file that are read at once."""


def of_json(value: Any) -> str:
    """Return the checksum of a JSON value, as hex. The order of an object's keys does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Any) -> str:
    """Return the checksum of a file's content, as hex. The path may be remote (`etils.epath`)."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def of_folder(folder: Any) -> dict[str, str]:
    """Return the checksum of every file below a folder, by its path from there; empty if there is no folder."""
    return {name: of_file(path) for name, path in _files(folder).items()}


def differing(folder: Any, expected: Mapping[str, str]) -> dict[str, str]:
    """Compare the files below a folder with their checksums.

    Returns:
      What is wrong with each file that differs, by its path: "does not match what was saved", "is missing", or "was not
      saved with it". Files whose names begin with a dot are ignored unless they are expected.
    """
    found = {n: p for n, p in _files(folder).items() if n in expected or not n.rpartition("/")[2].startswith(".")}
    wrong = dict.fromkeys(expected.keys() - found.keys(), "is missing")
    wrong |= dict.fromkeys(found.keys() - expected.keys(), "was not saved with it")
    for name in expected.keys() & found.keys():
        if not found[name].is_file() or of_file(found[name]) != expected[name]:
            wrong[name] = "does not match what was saved"
    return {name: wrong[name] for name in sorted(wrong)}


def _files(folder: Any) -> dict[str, Any]:
    """Return the files below a folder by their paths from there, with slashes. Links to folders are not followed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        inside = path.is_dir() and not Path(path).is_symlink()
        found |= {f"{path.name}/{n}": p for n, p in _files(path).items()} if inside else {path.name: path}
    return found
