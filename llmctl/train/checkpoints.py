"""Save checkpoints of a training run in the background, restore the newest intact checkpoint, and keep the best
parameters.

Each checkpoint stores checksums of its arrays. The checksums are compared after a restore, because TensorStore does not
store checksums of large arrays.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from llmctl.artifacts import orbax_logging
from llmctl.artifacts.atomic import disk_is_full
from llmctl.config import checksums
from llmctl.config.errors import WorkError
from llmctl.distributed import processes
from llmctl.train import array_checksums

ARRAYS, META = "arrays", "meta"
"""Names of two checksum entries in a checkpoint's JSON metadata: of the arrays, and of the metadata's other entries."""


class Checkpoints:
    """Save and restore the checkpoints of one training run in `folder`.

    An instance is a context manager. The end of the context waits for unfinished saves. If the disk is full, a save
    raises WorkError with the name of the newest intact checkpoint.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        orbax_logging.silence_late_errors()
        self.folder, self.keep, self.say = folder.absolute(), keep, say
        self._latest = self._open(self.folder / "steps", keep)
        self._best = self._open(self.folder / "best", 1)

    @staticmethod
    def _open(folder: Path, keep: int) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for manager in (self._latest, self._best):
            try:
                manager.close()
            except Exception as e:
                if kind is None:
                    raise self._explain(e) from e

    def _explain(self, e: Exception) -> Exception:
        intact = max(ocp.utils.checkpoint_steps(self.folder / "steps"), default=None)
        left = (
            f"the checkpoint of step {intact} is intact" if intact is not None else "no checkpoint was written before"
        )
        if disk_is_full(e):
            return WorkError(f"{self.folder}: the disk is full; {left}, free some space and run the same command")
        return WorkError(f"{self.folder}: a checkpoint could not be written ({' '.join(str(e).split())[:160]}); {left}")

    def save(self, step: int, state: Any, meta: dict[str, Any], *, wait: bool = False) -> None:
        """Write the training state and the JSON metadata of `step` to disk in the background.

        If `wait` is true, the method returns when both are on disk.
        """
        self._save(self._latest, step, state, meta, wait)

    def has_best(self, step: int) -> bool:
        """Return whether the best parameters on disk were saved at `step`."""
        return step in self._best.all_steps()

    def save_best(self, step: int, named: Any) -> None:
        """Store the parameters of `step` as the best parameters, and remove the previous best parameters.

        If the parameters of `step` are already stored, nothing is saved. A resumed run that repeats this step computes
        the same parameters.
        """
        if self.has_best(step):
            return
        self._save(self._best, step, named, {"step": step}, False)

    def _save(self, manager: ocp.CheckpointManager, step: int, state: Any, meta: dict[str, Any], wait: bool) -> None:
        try:
            if (
                processes.count() > 1
            ):  # Orbax distinguishes the barriers of both managers only by order, so saves must not overlap
                (self._best if manager is self._latest else self._latest).wait_until_finished()
            summed = meta | {ARRAYS: array_checksums.of_arrays(state)}
            summed |= {META: checksums.of_json(summed)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(summed))
            manager.save(step, args=args, force=True)
            if wait:
                manager.wait_until_finished()
        except Exception as e:
            raise self._explain(e) from e

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restore the newest intact checkpoint as (state, metadata), or return None if no intact checkpoint exists.

        The state gets the shapes and shardings of `abstract`. A checkpoint is damaged if any process cannot read its
        shards, or if a checksum differs. Damaged checkpoints are reported and moved to the folder `damaged`.
        """
        for step in sorted(self._latest.all_steps(), reverse=True):
            found, reason = None, ""
            try:
                found = self._read(step, abstract)
            except Exception as e:  # Orbax and TensorStore raise various types for damaged files
                reason = " ".join(str(e).split())[:90]
            reasons: list[str] = [r for r in processes.gather(reason) if r]
            if found and not reasons:
                meta, reason = self._meta(found, f"checkpoint of step {step}")
                if not reason:
                    return found["state"], meta
                reasons = [reason]
            self.say(f"checkpoint of step {step} is damaged ({reasons[0]}); going on from one before")
            if processes.first():
                self._set_aside(step)
            processes.barrier("aside")
            self._latest.reload()
        return None

    def _read(self, step: int, abstract: Any) -> Any:
        """Return this process's shards of the checkpoint of `step`, as (state, metadata).

        Orbax's manager is not used, because the manager would wait for processes that failed to read.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        return ocp.CompositeCheckpointHandler().restore(epath.Path(self.folder / "steps" / str(step)), args=args)

    def _meta(self, found: Any, name: str) -> tuple[dict[str, Any], str]:
        """Return (metadata of a restored checkpoint, reason why the checkpoint is damaged). The reason is "" if the
        checkpoint is intact."""
        meta = dict(found["meta"])
        expected, digest = meta.pop(ARRAYS, None), meta.pop(META, None)
        if expected is None:
            self.say(f"{name} has no checksums (an earlier llmctl saved it); it is not checked")
            return meta, ""
        if digest != checksums.of_json(meta | {ARRAYS: expected}):
            return meta, "its metadata do not match what was saved"
        sums = array_checksums.of_arrays(found["state"])
        wrong = sorted(n for n in sums.keys() | expected.keys() if sums.get(n) != expected.get(n))
        return meta, f"{wrong[0]} does not match what was saved" if wrong else ""

    def _set_aside(self, step: int) -> None:
        """Move a damaged checkpoint to the folder `damaged`.

        The checkpoint is not deleted. If a hardware fault made the read fail, the files may be intact.
        """
        aside = self.folder / "damaged" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        shutil.move(self.folder / "steps" / str(step), aside)

    def restore_best(self, step: int, abstract: Any) -> Any:
        """Restore and return the best parameters, which were saved at `step`. The parameters get the shardings of
        `abstract`.

        Raises:
          WorkError: If the parameters cannot be read.
        """
        self._best.wait_until_finished()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        try:
            found = self._best.restore(step, args=args)
            reason = self._meta(found, f"{self.folder}/best/{step}")[1]
        except Exception as e:
            raise self._unreadable(step, " ".join(str(e).split())[:120]) from e
        if reason:
            raise self._unreadable(step, reason)
        return found["state"]

    def _unreadable(self, step: int, reason: str) -> WorkError:
        return WorkError(
            f"{self.folder}/best/{step}: the best parameters cannot be read ({reason}); "
            f"remove {self.folder} to train again"
        )
