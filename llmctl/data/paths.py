"""Resolve path specifications (`a/*.csv`, `pkg:NAME/file`, `gs://…`) to existing paths."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from etils import epath

from llmctl.config.base import hint
from llmctl.config.containment import regular
from llmctl.config.errors import RequestError

GLOB = re.compile(r"[*?\[]")


def resolve(spec: str) -> list[epath.Path]:
    """Return the files that `spec` matches, sorted.

    Args:
        spec: Path, glob, or `pkg:NAME/path` for a file inside an installed Python package.

    Raises:
        RequestError: If nothing matches. If the path is a folder, pipe or device. If the package is not installed.
    """
    if not spec:
        raise RequestError("data has no path: set data.path, or name the recipe that has it with --recipe")
    path = folder(spec)
    # a file name may contain glob characters, such as "reviews [1].csv"
    if GLOB.search(str(path)) and not path.exists():
        found = sorted(p for p in _glob(path) if p.is_file())
        if not found:
            raise RequestError(f"no file matches {spec!r}")
        return found
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RequestError(f"no such file: {spec!r}{hint(path.name, siblings)}")
    if path.is_dir():
        raise RequestError(f"{spec!r} is a folder; name its files with a glob such as {spec.rstrip('/') + '/*'!r}")
    return [regular(path)]


def files_below(spec: str) -> list[epath.Path]:
    """Return all files below the folder `spec`, sorted. If `spec` is a file or glob, return `resolve(spec)`.

    Raises:
        RequestError: If nothing matches, or if a matching file is a pipe or a device.
    """
    path = folder(spec)
    if not path.is_dir():
        return resolve(spec)
    return sorted(regular(at / name) for at, _, names in path.walk() for name in names)


def folder(spec: str) -> epath.Path:
    """Convert `spec` to a path, without a check that the file or folder exists. See `resolve` for the formats.

    Raises:
        RequestError: If the package is not installed, or if the remote store cannot be read.
    """
    if "://" in spec:
        return _remote(spec)
    return _inside_package(spec) if spec.startswith("pkg:") else epath.Path(spec).expanduser()


def is_local(path: epath.Path) -> bool:
    """Return True if `path` is on a local file system, so that the file can be memory-mapped."""
    return "://" not in str(path)


def keep_open(files: int) -> None:
    """Raise the limit of open files of this process by `files`, because shells often allow only 1024.

    The limit is not raised beyond the maximum of the system.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        most = soft + files if hard == resource.RLIM_INFINITY else min(soft + files, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has a second, lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _glob(path: epath.Path) -> Iterable[epath.Path]:
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if GLOB.search(part))
    base = epath.Path(*parts[:first]) if first else epath.Path(".")
    pattern = str(PurePosixPath(*parts[first:]))
    if not base.is_dir():
        return []
    if is_local(path):
        return map(epath.Path, Path(base).glob(pattern))
    if "**" in pattern:
        raise RequestError(f"{str(path)!r}: ** searches local folders alone; name each level with *")
    return base.glob(pattern)


def _remote(spec: str) -> epath.Path:
    """Convert a URL such as `gs://…` to a path, and check that the remote store can be read.

    The check fails, for example, if the optional package for this store is not installed.
    """
    try:
        path = epath.Path(spec)
        path.exists()
    except KeyError:
        store = spec.partition("://")[0]
        raise RequestError(f"{spec!r}: {store}:// is no known store of files; download the data first") from None
    except Exception as e:  # each store's library has its own exceptions
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise RequestError(f"{spec!r}: cannot be reached ({reason})") from None
    return path


def _inside_package(spec: str) -> epath.Path:
    """Convert `pkg:NAME/path` to a path without importing NAME, because the import may be slow or have side effects."""
    name, _, inner = spec.removeprefix("pkg:").partition("/")
    if not name.isidentifier() or not inner:
        raise RequestError(f"{spec!r} should read pkg:NAME/path/of/file, NAME an installed Python package")
    found = importlib.util.find_spec(name)
    if found is None:
        raise RequestError(
            f"{spec!r}: the Python package {name!r} is not installed (try: pip install {name.replace('_', '-')})"
        )
    for place in found.submodule_search_locations or []:
        path = epath.Path(place) / inner
        if path.exists() or GLOB.search(inner):
            return path
    raise RequestError(f"{spec!r}: the Python package {name!r} has no file {inner!r}")
