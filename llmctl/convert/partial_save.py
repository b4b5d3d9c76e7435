"""Save the parameters of an import one at a time, so that an interrupted import can resume.

Only one parameter is in memory, and a killed process loses at most one parameter. The parameters are written to a
folder next to the artifact's path. The folder also has a hash of the imported files and settings. If the same import is
started again, it resumes from this folder. An import with another hash deletes the folder and starts again.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from llmctl.artifacts import fingerprint
from llmctl.artifacts.atomic import disk_is_full
from llmctl.config import containment
from llmctl.config.errors import WorkError
from llmctl.convert import name_map
from llmctl.distributed import locks
from llmctl.model import weights


@contextlib.contextmanager
def opened(out: Path, key: str) -> Iterator[Stream]:
    """Yield a `Stream`, to which the parameters of the artifact `out` are written.

    The Stream's folder is deleted at the end, also after an exception. The folder remains only if the process is killed
    or interrupted.

    Args:
        out: Folder of the future artifact.
        key: Hash of the imported files and of the settings.
    """
    with locks.claim(out):
        stream = Stream(out, key)
        try:
            yield stream
        except Exception as e:
            stream.remove()
            if disk_is_full(e):
                raise WorkError(
                    f"{out}: the disk is full; nothing was written there, free some space and begin anew"
                ) from e
            raise
        stream.remove()


class Stream:
    """Write parameters to a folder, one by one. Each parameter is committed and recorded before the next is read."""

    def __init__(self, out: Path, key: str) -> None:
        """Open or create the folder.

        Args:
            out: Folder of the future artifact.
            key: Hash of the imported files and of the settings. Parameters that were written for another key are
                deleted.
        """
        self.folder = locks.scratch(out, "import")
        self._arrays, self._log, key_file = (self.folder / name for name in ("arrays", "written", "key"))
        taken = self._arrays.exists() and not (self._arrays / "state").exists()  # killed while it became an artifact
        if taken or not key_file.is_file() or key_file.read_text() != key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            key_file.write_text(key)
        containment.check(self.folder)
        lines = self._log.read_text().splitlines() if self._log.is_file() else []
        self.before = dict(line.split("\t") for line in lines if line.count("\t") == 1)
        """Digest of each parameter that an earlier process wrote, by path."""
        self._digests = dict(self.before)
        self._targets: dict[str, jax.ShapeDtypeStruct] = {}

    def place(self, placer: name_map.Place, passed: Callable[[int], None]) -> name_map.Place:
        """Return a function that reads a parameter, writes it to the folder and frees its memory.

        The function skips parameters that an earlier process has written.

        Args:
            placer: Function that reads a parameter and places it on its devices.
            passed: Function that is called with the size in bytes of each parameter that already exists in the folder.
        """

        def write(path: str, w: name_map.Pending) -> None:
            from orbax.checkpoint._src.handlers.base_pytree_checkpoint_handler import PartialSaveReplacementError
            from orbax.checkpoint.experimental.v1 import partial

            self._targets[path] = jax.ShapeDtypeStruct(w.shape, w.dtype)
            if path in self.before:
                passed(math.prod(w.shape) * w.dtype.itemsize)
                return
            array = placer(path, w)
            self._digests[path] = fingerprint.digest({path: array})
            with contextlib.suppress(PartialSaveReplacementError):  # killed between commit and record
                partial.save(str(self._arrays.absolute()), weights.unflatten({path: array}))
            with self._log.open("a") as log:
                log.write(f"{path}\t{self._digests[path]}\n")

        return write

    def finish(self, shardings: Mapping[str, Any]) -> Stored:
        """Complete the folder after all parameters are written, and return a mapping that reads parameters by path."""
        from orbax.checkpoint.experimental.v1 import partial

        if not self._arrays.exists():
            partial.finalize(str(self._arrays.absolute()))
        targets = {k: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=shardings[k]) for k, t in self._targets.items()}
        return Stored(self._arrays / "state", targets, self._digests)

    def remove(self) -> None:
        """Delete the folder of parameters."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Stored(Mapping[str, Any]):
    """Read parameters by path from disk on every access, and check their digests."""

    def __init__(
        self, folder: Path, targets: Mapping[str, jax.ShapeDtypeStruct], digests: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.targets, self.digests = folder, targets, digests or {}

    def __getitem__(self, path: str) -> jax.Array:
        import orbax.checkpoint as ocp

        tree = weights.unflatten({path: self.targets[path]})
        options = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        again = "run the same import again"
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                found = weights.flatten(checkpointer.restore(self.folder.absolute(), args=options))[path]
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            reason = " ".join(str(e).split())[:120]
            raise WorkError(f"{self.folder}: {path} cannot be read ({reason}); {again}") from e
        if path in self.digests and fingerprint.digest({path: found}) != self.digests[path]:
            raise WorkError(f"{self.folder}: {path} does not match what was written; {again}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)
