"""Keep two llmctl processes from writing one folder, and name the files that llmctl writes beside it."""

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
"""Most bytes of a folder's name: file systems allow 255, and names of scratch files are longer."""

ATTEMPTS = 100
"""Most attempts to create a lock's file, whose folder the last holder of another lock may remove."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the operating system for which the request is not the reason."""

_claimed: set[Path] = set()


def scratch(out: Path, what: str) -> Path:
    """Return the hidden path beside `out` for llmctl's own use, such as `.out.llmctl-draft`.

    Raises:
      RequestError: there is a link.
    """
    return containment.own(out.parent / f".{out.name}.llmctl-{what}")


def check_name(name: str, where: str) -> None:
    """Check that a folder can have this name, before any work is done.

    Raises:
      RequestError: the name is too long, is not valid text, or contains a NUL or a slash.
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
    """Check that arrays can be written below a folder. Orbax merges the files of all paths that match it as a glob.

    Raises:
      RequestError: the absolute path has a character that means something in globs.
    """
    if found := re.search(r"[\[\]*?\\]", str(path.absolute())):
        raise RequestError(
            f"{where}: its path has {found.group()!r}, with which arrays cannot be saved; choose another"
        )


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Be the only process that writes `out` while the context lasts. Claims of one process nest.

    Raises:
      RequestError: another process writes it.
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
    """Lock the file `path` while the context lasts. Only process 0 of a run locks. The kernel unlocks at its death.

    The last holder removes the file, and its folder if it made that and it is empty.

    Args:
      path: the lock's file.
      what: what is locked, for the message.
      shared: other holders of a shared lock are let in.
      own_folder: the folder is llmctl's, and is removed if it is empty, whoever made it.

    Raises:
      RequestError: another process holds it, the file or its folder is a link, or no file can be made there.
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
