"""Reject names, links and special files that would lead a read or a write outside a folder.

Artifacts, prepared data, tokenizers and model folders may come from other people. A link or a `../` in such a folder
could make llmctl copy a private file into its output. The path that the user names may itself be a link. Only the files
below this path are checked.

A link may point only to a file of the same folder. There is one exception. A snapshot in Hugging Face's cache may link
to the folder `blobs` of the same model. This folder contains all files of the model.

Example:
    >>> str(within(Path("model"), "weights/part-1.safetensors"))
    'model/weights/part-1.safetensors'
    >>> within(Path("model"), "../secret")
    Traceback (most recent call last):
        ...
    llmctl.config.errors.RequestError: model: names '../secret', which is not inside it
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from llmctl.config.errors import RequestError

P = TypeVar("P", bound=Any)


def within(folder: P, name: str) -> P:
    """Return the path of `name` inside a folder, whether or not a file exists there.

    Args:
        folder: A local or remote folder.
        name: Relative path, often read from a file of the folder.

    Raises:
        RequestError: If the name or a link leads outside the folder. If the path is no regular file or folder.
    """
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise RequestError(f"{folder}: names {name!r}, which is not inside it")
    path = folder / name
    if _is_local(folder):
        _check(Path(folder), Path(path))
    return path


def check(folder: Any) -> None:
    """Check that no link below a local folder leads outside the folder, and that all files are regular.

    Raises:
        RequestError: If a link leads outside the folder or to a folder. If a file is a pipe, socket or device.
    """
    if not _is_local(folder):
        return
    for at, folders, files in os.walk(folder):
        for name in files:
            _check(Path(folder), Path(at, name))
        for name in folders:
            if (path := Path(at, name)).is_symlink():
                raise RequestError(f"{path}: is a link to the folder {_target(path)}; put the folder itself there")


def copy(folder: Path, target: Path) -> None:
    """Copy a folder to `target`. For a link, the file that the link points to is copied.

    Raises:
        RequestError: If `check` rejects the folder.
    """
    check(folder)
    shutil.copytree(folder, target)


def regular(path: P) -> P:
    """Check that `path` is a regular file, a folder or a path where nothing exists, and return `path`.

    Raises:
        RequestError: If `path` is a pipe, a socket or a device, because reading may never end.
    """
    if _is_local(path):
        try:
            mode = Path(path).stat().st_mode
        except (OSError, ValueError):
            return path
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
            kind = next((word for matches, word in kinds if matches(mode)), "a device")
            raise RequestError(f"{path}: is {kind}, and llmctl reads regular files; write its content to a file")
    return path


def own(path: P) -> P:
    """Check that the path of a temporary file or a lock file is not a link, and return the path.

    Call this before writing the file.

    Raises:
        RequestError: If the path is a link, because the file would then be written elsewhere.
    """
    if _is_local(path) and Path(path).is_symlink():
        raise RequestError(f"{path}: is a link to {_target(path)}, and llmctl writes its own files there; remove it")
    return path


def _check(folder: Path, path: Path) -> None:
    real = _target(path)
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise RequestError(f"{path}: is a link to {real}, outside {folder}; put a copy there in its place")
    regular(path)


def _roots(folder: Path) -> list[Path]:
    """Return the folders that links in `folder` may point into: `folder` and, in Hugging Face's cache, `blobs`."""
    real = folder.resolve()
    roots = [real]
    for above in (real, *real.parents):
        blobs = above.parent.parent / "blobs"
        if above.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            roots.append(blobs)
    return roots


def _target(path: Any) -> Path:
    """Follow all links of a path, and return the target. If the links form a cycle, follow only the first link."""
    try:
        return Path(path).resolve(strict=False)
    except (OSError, RuntimeError):
        return Path(os.path.normpath(Path(path).parent / Path(path).readlink()))


def _is_local(path: Any) -> bool:
    return "://" not in str(path)
