"""Write folders atomically, and recognize errors that a full disk causes."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmctl.config.errors import LlmctlError, RequestError, WorkError
from llmctl.distributed import locks, processes


def check(out: Path, flag: str = "--out") -> None:
    """Check that an artifact can be written to the path `out`, before any work is done.

    Args:
        out: The path.
        flag: Flag of the command line that sets the path, for the error message.

    Raises:
        RequestError: If the path has no folder name (such as "." or "/"), or a name that is too long. If the path is in
            a remote store, or is a link to a missing file. If the path is inside another artifact, because replacing
            the outer artifact would delete the inner artifact.
    """
    if out.name in ("", ".."):
        raise RequestError(f"{flag} {out}: say the folder's name, such as {out.resolve()}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(out)):  # a path keeps one slash of gs://
        raise RequestError(f"{flag} {out}: is no local folder; write to one, and copy it")
    locks.check_name(out.name, f"{flag} {out}")
    if out.is_symlink() and not out.exists():
        raise RequestError(f"{flag} {out}: is a link that leads nowhere; remove it, or choose another place")
    for above in (out.parent.resolve() / out.name).parents:
        if (above / "manifest.json").is_file() and (above / "params").is_dir():
            raise RequestError(f"{flag} {out}: is inside the artifact {above}, and is lost when that is made anew")


def check_apart(folder: Path, out: Path, flag: str) -> None:
    """Check that a folder is neither the artifact `out` nor inside it.

    A stage stores further files in this folder, such as a teacher's outputs. They must remain when the artifact is
    replaced.

    Args:
        folder: The folder.
        out: Folder of the artifact, which is replaced when the artifact is saved.
        flag: Setting that names the folder, for the error message.

    Raises:
        RequestError: If the folder would be lost when the artifact is saved, or if `check` refuses it.
    """
    check(folder, flag)
    if folder.resolve().is_relative_to(out.resolve()):
        raise RequestError(f"{flag} {folder}: is lost when the artifact {out} is saved; choose another folder")


def write_text(out: Path, text: str) -> None:
    """Write a text file as UTF-8. The file appears, or replaces an existing file, only when it is complete."""
    draft = locks.scratch(out, "draft")
    with locks.claim(out):
        try:
            draft.write_text(text, encoding="utf-8", newline="\n")
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)


WRITTEN_IN_PART = re.compile(r"^\d+ requested and \d+ written$")
"""Regular expression for NumPy's error message if an array was written only in part, because the disk is full."""


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `out` at the end of the `with` statement.

    If the body raises an error, the temporary folder is deleted and `out` is unchanged. With several processes, process
    0 creates, renames and deletes the folder. All processes may use the folder in the body.

    Raises:
        RequestError: If another process writes `out`.
        WorkError: If the disk is full.
    """
    out = Path(out)
    draft, old = locks.scratch(out, "draft"), locks.scratch(out, "old")
    if not processes.first():
        processes.barrier("draft")
        yield draft
        processes.barrier("written")
        processes.barrier("renamed")
        return
    with locks.claim(out):
        try:
            # an earlier process was killed between the two renames below; the old folder is intact
            if old.exists() and not out.exists():
                old.rename(out)
            for stale in (draft, old):
                shutil.rmtree(stale, ignore_errors=True)
            draft.mkdir()
            processes.barrier("draft")
            yield draft
            processes.barrier("written")
            if out.exists():
                out.rename(old)
            draft.rename(out)
            shutil.rmtree(old, ignore_errors=True)
            processes.barrier("renamed")
        except LlmctlError:
            raise
        except Exception as e:
            if disk_is_full(e):
                raise WorkError(
                    f"{out}: the disk is full; nothing was written there, free some space and run the same command"
                ) from e
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def disk_is_full(e: BaseException | None) -> bool:
    """Return True if an error, or one of its causes, reports a full disk or an exhausted quota.

    TensorStore, ArrayRecord and NumPy report this only in the text of the error.
    """
    while e is not None:
        if isinstance(e, OSError) and (e.errno in (errno.ENOSPC, errno.EDQUOT) or WRITTEN_IN_PART.search(str(e))):
            return True
        if "No space left on device" in str(e):
            return True
        e = e.__cause__ or e.__context__
    return False


def size(folder: Path) -> int:
    """Return the total size of the files below a folder, in bytes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
