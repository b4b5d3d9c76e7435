"""Folders that appear whole or not at all, and what a full disk looks like."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmctl.config.errors import LlmctlError, RequestError, WorkError
from llmctl.distributed import processes


def check(out: Path) -> None:
    """Raises RequestError for a folder that is not called by its name: it comes into its place by renaming."""
    if out.name in ("", ".."):
        raise RequestError(f"--out {out}: say the folder's name, such as {out.resolve()}")


WRITTEN_IN_PART = re.compile(r"^\d+ requested and \d+ written$")
"""What NumPy says where an array did not fit."""


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A draft folder that becomes `out` when the block ends well, and vanishes when it does not.

    Of several processes the first makes, renames and removes it; the others have it while the block lasts.
    """
    out = Path(out)
    draft = out.parent / f".{out.name}.draft"
    old = out.parent / f".{out.name}.old"
    if not processes.first():
        processes.together("draft")
        yield draft
        processes.together("written")
        processes.together("renamed")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not out.exists():  # killed between the two renames below: what was there is still good
            old.rename(out)
        for stale in (draft, old):
            shutil.rmtree(stale, ignore_errors=True)
        draft.mkdir()
        processes.together("draft")
        yield draft
        processes.together("written")
        if out.exists():
            out.rename(old)
        draft.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        processes.together("renamed")
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
    """True where an error, or what caused it, is about space (TensorStore, ArrayRecord and NumPy say it in words)."""
    while e is not None:
        if isinstance(e, OSError) and (e.errno in (errno.ENOSPC, errno.EDQUOT) or WRITTEN_IN_PART.search(str(e))):
            return True
        if "No space left on device" in str(e):
            return True
        e = e.__cause__ or e.__context__
    return False


def size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
