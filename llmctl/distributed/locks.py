"""Prevent two llmctl processes from writing one folder, and name the temporary files next to the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.config import containment
from llmctl.config.errors import RequestError
from llmctl.distributed import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST = 200
"""Maximum size of a folder's name in bytes. File systems allow 255, but the temporary files next to the folder have
longer names."""

ATTEMPTS = 100
"""Maximum number of attempts to create a lock file. An attempt fails if another process has just removed the folder of
the lock file."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Error numbers that report a problem of the machine, such as a full disk, and not an invalid request."""

_claimed: set[Path] = set()


def scratch(out: Path, what: str) -> Path:
    """Return the path of a hidden temporary file or folder next to `out`.

    Args:
        out: Path of the output.
        what: Last word of the name. For the output `out` and the word "draft", the path is `.out.llmctl-draft`.

    Raises:
        RequestError: If the path is a link.
    """
    return containment.own(out.parent / f".{out.name}.llmctl-{what}")


def check_name(name: str, where: str) -> None:
    """Check that `name` is valid as a folder name, before any work is done.

    Args:
        name: The name.
        where: Beginning of the error message, such as the path.

    Raises:
        RequestError: If the name is too long, is not valid Unicode, or contains a NUL or a slash.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{where}: its name is not valid Unicode") from None
    if size > LONGEST:
        raise RequestError(f"{where}: its name has {size} bytes; {LONGEST} at most")
    if "/" in name or "\0" in name:
        raise RequestError(f"{where}: a name has no slash and no NUL")


def check_path(path: Path, where: str) -> None:
    """Check that Orbax can write arrays below a folder.

    Orbax interprets the path as a glob pattern, so the path must not contain characters of such patterns.

    Args:
        path: The folder.
        where: Beginning of the error message.

    Raises:
        RequestError: If the absolute path contains one of the characters `[]*?` or a backslash.
    """
    if found := re.search(r"[\[\]*?\\]", str(path.absolute())):
        raise RequestError(
            f"{where}: its path has {found.group()!r}, with which arrays cannot be saved; choose another"
        )


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Lock `out` for writing while the context lasts. Nested locks of the same process are allowed.

    Raises:
        RequestError: If another process has locked `out`.
    """
    out = Path(out)
    place = out.parent.resolve() / out.name
    if place in _claimed or not processes.first():
        yield
        return
    with lock(scratch(place, "lock"), str(out)):
        _claimed.add(place)
        try:
            yield
        finally:
            _claimed.discard(place)


@contextlib.contextmanager
def lock(path: Path, what: str, *, shared: bool = False, own_folder: bool = False) -> Iterator[None]:
    """Lock the file `path` while the context lasts.

    If a command runs in several processes, only process 0 takes the lock.

    The kernel releases the lock if the process dies. The last process that releases the lock removes the file. This
    process also removes the file's folder if the folder is empty and was created by this process.

    Args:
        path: Path of the lock file.
        what: Name of the locked object, for the error message.
        shared: Whether several processes may take the lock with shared=True at the same time.
        own_folder: Whether only llmctl uses the file's folder. If true, an empty folder is removed, even if another
            process created the folder.

    Raises:
        RequestError: If another process has the lock. If the file or its folder is a link. If the file cannot be
          created.
    """
    if not processes.first():
        yield
        return
    containment.own(path.parent)
    made, attempts = not path.parent.exists(), 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = containment.regular(containment.own(path)).open("a+")
        except OSError as e:
            attempts += 1
            if e.errno == errno.ENOENT and attempts < ATTEMPTS:  # its folder was removed in between
                continue
            if e.errno in FULL:
                raise
            raise RequestError(f"{what}: {e.filename}: {str(e.strerror).lower()}; choose another place") from None
        with contextlib.suppress(FileNotFoundError):
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip()
                file.close()
                raise RequestError(
                    f"{what}: another llmctl{f' (process {who})' if who else ''} is at work there"
                ) from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
            file.close()  # its last holder removed it
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                if made or own_folder:
                    path.parent.rmdir()
