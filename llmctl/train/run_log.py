"""How a run reports itself: `log.jsonl` always, a progress bar for people, TensorBoard and W&B where asked for."""

from __future__ import annotations

import json
import math
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmctl.config.errors import RequestError
from llmctl.distributed import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

LOG = "log.jsonl"
SHORT = {
    "learning_rate": "lr",
    "tokens_per_second": "tok/s",
    "examples_per_second": "ex/s",
    "gradient_norm": "gnorm",
    "input_wait": "wait",
    "memory_gib": "GiB",
}
"""Names as the progress line shows them."""
UNSHOWN = frozenset({"step_seconds"})
"""Metrics that the log has and the progress line spares people: others say the same."""


class Reporter:
    """One stage's log. A context manager; every `log` call is one line of `<work_dir>/log.jsonl`, flushed at once.

    A resumed run passes the step it goes on from as `start`: lines of later steps, which the interrupted run wrote and
    the resumed one will write again, are dropped, so that the log holds every step once.

    On a terminal a bar shows step, metrics, elapsed and remaining time; elsewhere a plain line appears at most every
    `every` seconds, and at the last step. Both go to stderr: stdout belongs to results.

    Args:
      work_dir: folder of the log; made if need be.
      total_steps: steps of the whole run, those before `start` included.
      title: what the bar is called, usually the stage's name.
      tensorboard: also write events into `<work_dir>/tensorboard`.
      start: the step resumed from; 0 starts afresh.
      lasting: folder for what should outlive `work_dir`: TensorBoard events in `tensorboard/<title>`, W&B's files in
        `wandb`. By default they lie in `work_dir`, the events in `tensorboard`.
      wandb: a Weights & Biases project to log to as well (extra `wandb`); empty does not. A resumed run goes on as the
        same W&B run.
      writes: whether this process writes and shows anything; by default the first of several does.
      console: where people read; stderr by default.

    Raises:
      RequestError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        work_dir: Path | str,
        total_steps: int,
        title: str,
        tensorboard: bool = True,
        *,
        start: int = 0,
        lasting: Path | None = None,
        wandb: str = "",
        writes: bool | None = None,
        every: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.work_dir, self.total, self.title, self.start = Path(work_dir), total_steps, title, start
        self.events_folder = lasting / "tensorboard" / title if lasting else self.work_dir / "tensorboard"
        """Where TensorBoard finds this run."""
        self._wandb_folder = lasting or self.work_dir
        self.writes = processes.first() if writes is None else writes
        self.every, self.clock = every, clock
        self.console = console or Console(stderr=True)
        self._tensorboard, self._wandb = tensorboard, wandb
        self._file: TextIO | None = None
        self._events: Any = None
        self._run: Any = None
        self._bar: Progress | None = None
        self._shown = -math.inf
        self._first: tuple[int, float] | None = None
        self._latest: dict[str, float] = {}

    def __enter__(self) -> Reporter:
        if not self.writes:
            return self
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if self._wandb:
            self._run = _wandb_run(self._wandb, self.title, self._wandb_folder, self._wandb_id())
        log = self.work_dir / LOG
        _forget_after(log, self.start)
        self._file = log.open("a", encoding="utf-8")
        if self._tensorboard:
            from tensorboardX import SummaryWriter

            if self.start == 0:  # another run's curves, left by different settings
                shutil.rmtree(self.events_folder, ignore_errors=True)
            self._events = SummaryWriter(str(self.events_folder), purge_step=self.start + 1)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=False,
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, metrics="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        for writer in (self._file, self._events):
            if writer:
                writer.close()
        if self._run:
            self._run.finish(exit_code=0 if kind is None else 1)
        self._bar = self._file = self._events = self._run = None

    def _wandb_id(self) -> str:
        """W&B's name of this run, kept with the work so that a resumed one has the same."""
        file = self.work_dir / "wandb_id"
        if self.start == 0 or not file.exists():
            file.write_text(secrets.token_hex(8), encoding="utf-8")
        return file.read_text(encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line for `step` (the number of steps done) and moves the bar there.

        Args:
          step: optimizer steps finished.
          metrics: scalars by name: numbers, or anything `float` takes (arrays of no dimension). A value that is not
            finite is written as null, because JSON has no NaN.
        """
        values = {name: _number(value) for name, value in metrics.items()}
        self._latest.update({k: v for k, v in values.items() if isinstance(v, (int, float))})
        if not self.writes:
            return
        if self._file is None:
            raise RuntimeError("Reporter.log outside of `with Reporter(...)`")
        line = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **line}) + "\n")
        self._file.flush()
        self._add_events(values, step)
        if self._run:
            self._run.log(values, step=step)
        self._show(step)

    def _add_events(self, values: Mapping[str, Any], step: int) -> None:
        """TensorBoard, as long as its writing thread lives; without one (full disk) its queue would block the run."""
        if not self._events:
            return
        if not self._events.file_writer.event_writer._worker.is_alive():
            self.say("TensorBoard events could not be written (is the disk full?); the run goes on without them")
            self._events = None
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """One line for people, above the bar."""
        if self.writes:
            self.console.print(f"{self.title}: {text}", markup=False, highlight=False, soft_wrap=True)

    def _show(self, step: int) -> None:
        shown = [(n, v) for n, v in self._latest.items() if n not in UNSHOWN]
        text = "  ".join(f"{SHORT.get(name, name)} {_brief(value)}" for name, value in shown)
        if self._bar:
            self._bar.update(self._task, completed=step, metrics=text)
            return
        now = self.clock()
        first, began = self._first = self._first or (step, now)  # the time before it was spent on compiling
        if now - self._shown >= self.every or step >= self.total:
            self._shown = now
            left = (now - began) / (step - first) * (self.total - step) if step > first else 0
            self.say(f"step {step}/{self.total}  {text}{f'  ETA {_duration(left)}' if left else ''}")


def _forget_after(log: Path, step: int) -> None:
    """Drops the lines of later steps, and a last line that a killed process left half-written."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and line.endswith("\n") and entry.get("step", 0) <= step and step > 0:
            kept.append(line)
    beside = log.with_name(log.name + ".new")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(log)


def _wandb_run(project: str, title: str, folder: Path, run_id: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise RequestError("W&B logging needs the package wandb: pip install 'llmctl[wandb]'") from None
    return wandb.init(project=project, name=title, dir=str(folder), id=run_id, resume="allow")


def _number(value: Any) -> int | float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else float(value)


def _brief(value: float) -> str:
    """Four digits that a person can compare from line to line: 12,345  3.142  1.0e-05."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    if value and math.isfinite(value) and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
