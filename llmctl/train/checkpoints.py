"""Checkpoints of a running stage: saved in the background, the newest intact one on resume, the best beside them."""

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
from llmctl.config.errors import WorkError
from llmctl.distributed import processes


class Checkpoints:
    """The training state of one stage under `folder`; a context manager that waits for saves under way.

    A save that the disk has no room for is a WorkError that names the checkpoint which is intact.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        orbax_logging.hush()
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
        """Writes state and JSON meta of `step` in the background; `wait` returns once they are on disk."""
        self._save(self._latest, step, state, meta, wait)

    def has_best(self, step: int) -> bool:
        """Whether the best parameters that are kept are those of `step`."""
        return step in self._best.all_steps()

    def save_best(self, step: int, named: Any) -> None:
        """Keeps these parameters as the best so far, instead of those before.

        A resumed run that comes by a step again finds there what it would write, bit for bit.
        """
        if self.has_best(step):
            return
        self._save(self._best, step, named, {"step": step}, False)

    def _save(self, manager: ocp.CheckpointManager, step: int, state: Any, meta: dict[str, Any], wait: bool) -> None:
        try:
            if (
                processes.count() > 1
            ):  # Orbax tells both managers' barriers apart by their order alone: one save at a time
                (self._best if manager is self._latest else self._latest).wait_until_finished()
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            manager.save(step, args=args, force=True)
            if wait:
                manager.wait_until_finished()
        except Exception as e:
            raise self._explain(e) from e

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest intact checkpoint as (state, meta), onto the shardings of `abstract`; None where there is none.

        A damaged one is named and set aside; of several processes one that cannot read its part is enough.
        """
        for step in sorted(self._latest.all_steps(), reverse=True):
            found, reason = None, ""
            try:
                found = self._read(step, abstract)
            except Exception as e:  # whatever Orbax and TensorStore raise for a damaged file
                reason = " ".join(str(e).split())[:90]
            reasons: list[str] = [r for r in processes.gather(reason) if r]
            if found and not reasons:
                return found["state"], found["meta"]
            self.say(f"checkpoint of step {step} is damaged ({reasons[0]}); going on from one before")
            if processes.first():
                self._set_aside(step)
            processes.together("aside")
            self._latest.reload()
        return None

    def _read(self, step: int, abstract: Any) -> Any:
        """What this process reads of a checkpoint. With Orbax's manager who can read would wait for who cannot."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        return ocp.CompositeCheckpointHandler().restore(epath.Path(self.folder / "steps" / str(step)), args=args)

    def _set_aside(self, step: int) -> None:
        """Not deleted: what made it unreadable may have been the machine and not the file."""
        aside = self.folder / "damaged" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        shutil.move(self.folder / "steps" / str(step), aside)

    def restore_best(self, step: int, abstract: Any) -> Any:
        """The best parameters, saved at `step`.

        Raises WorkError where they cannot be read.
        """
        self._best.wait_until_finished()
        try:
            return self._best.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
        except Exception as e:
            reason = " ".join(str(e).split())[:120]
            raise WorkError(
                f"{self.folder}/best/{step}: the best parameters cannot be read ({reason}); "
                f"remove {self.folder} to train again"
            ) from e
