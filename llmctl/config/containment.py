"""Keep reads and writes inside a folder: names, links and special files that lead out of it are refused.

Artifacts, prepared data, tokenizers and model folders come from other people. A link or a `../` in them could make
llmctl copy a private file into its output. A path that the user names may itself be a link; this module checks what is
below it.

A link is followed only to a file of the same folder. A snapshot in Hugging Face's cache may also link to the `blobs` of
its own model, because that cache stores every file there.

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
    """Return the path of what `name` stands for in a folder. It may be absent.

    Args:
      folder: a local or remote folder.
      name: relative path, often one that a file of the folder contains.

    Raises:
      RequestError: the name or a link leads out of the folder, or there is something else than a file or folder.
    """
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise RequestError(f"{folder}: names {name!r}, which is not inside it")
    path = folder / name
    if _is_local(folder):
        _check(Path(folder), Path(path))
    return path


def check(folder: Any) -> None:
    """Check everything below a local folder as `within` does. Links to folders are refused.

    Raises:
      RequestError: a link leads out of the folder or to a folder, or there is a special file.
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
    """Copy a folder with the files that its links stand for.

    Raises:
      RequestError: as `check`.
    """
    check(folder)
    shutil.copytree(folder, target)


def regular(path: P) -> P:
    """Return a path that is absent, a folder, or a regular file. Pipes, sockets and devices may never end.

    Raises:
      RequestError: it is something else.
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
    """Return a path at which llmctl writes its own scratch files or locks.

    Raises:
      RequestError: it is a link, so the files would be written elsewhere.
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
    """Return the folders that files of `folder` may be in: itself, and the blobs of a Hugging Face cache around it."""
    real = folder.resolve()
    roots = [real]
    for above in (real, *real.parents):
        blobs = above.parent.parent / "blobs"
        if above.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            roots.append(blobs)
    return roots


def _target(path: Any) -> Path:
    """Return the file that a path leads to in the end; of links in a circle, the next one."""
    try:
        return Path(path).resolve(strict=False)
    except (OSError, RuntimeError):
        return Path(os.path.normpath(Path(path).parent / Path(path).readlink()))


def _is_local(path: Any) -> bool:
    return "://" not in str(path)
