"""Log a training run to `log.jsonl`, a progress bar, and optionally TensorBoard and Weights & Biases (W&B)."""

from __future__ import annotations

import json
import math
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmctl.config.errors import RequestError
from llmctl.config.terminal import terminal, visible
from llmctl.distributed import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from rich.console import Console

    from llmctl.compress.calibration.calibrate import LayerReport

LOG = "log.jsonl"
SHORT = {
    "learning_rate": "lr",
    "tokens_per_second": "tok/s",
    "examples_per_second": "ex/s",
    "gradient_norm": "gnorm",
    "input_wait": "wait",
    "memory_gib": "GiB",
}
"""Short names of metrics in the progress line, which shows the state of training in the terminal."""
MEANINGS = {
    "gnorm": "norm of the gradient",
    "wait": "share of the time in which the devices wait for rows",
    "mfu": "model FLOP/s as a share of the hardware's peak",
    "GiB": "peak memory",
    "sparsity": "share of zeros in the matrices of the layers",
    "influence": "change of the hidden states by the layer, 0 if none",
    "layer_error": "change of the layer's output by the compression, relative",
    "calibration_loss": "loss of the calibration data if the model had other sizes or formats",
}
"""Explanations of the short names in the progress line. Each process prints an explanation once, before the first line
with the name."""
_explained: set[str] = set()
UNSHOWN = frozenset({"step_seconds"})
"""Metrics that are written to the log but not shown in the progress line. Another metric in the line implies their
values.
"""


class Reporter:
    """Log the metrics of one training run. Each call of `log` appends one line to `<work_dir>/log.jsonl`.

    A Reporter is a context manager.

    A resumed run passes its first step as `start`. Lines of later steps are removed, because the resumed run writes
    these lines again. The log therefore contains every step once.

    On a terminal a bar shows step, metrics, elapsed and remaining time. Otherwise a plain line is printed at most every
    `every` seconds, and at the last step. Bar and lines are written to stderr, because stdout is for results.

    Args:
      work_dir: folder of the log. If the folder is missing, it is created.
      total_steps: steps of the complete run, including the steps before `start`.
      title: title of the bar, usually the name of the command.
      tensorboard: whether to write events to `<work_dir>/tensorboard` too.
      start: step from which the run resumes; 0 starts a new log.
      lasting: folder for files that remain after `work_dir` is removed: TensorBoard events in `tensorboard/<title>`,
          W&B's files in `wandb`. By default, these files are in `work_dir`, and the events are in `tensorboard`.
      wandb: W&B project to log to (extra `wandb`); empty disables W&B. A resumed run continues the same W&B run.
      writes: whether this process writes and prints. By default, only process 0 writes and prints.
      every: seconds between plain lines.
      console: console of the bar and of plain lines; stderr by default.
      clock: function that returns the time in seconds.

    Raises:
      RequestError: If W&B is requested and not installed.
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
        """Folder of this run's TensorBoard events."""
        self._wandb_folder = lasting or self.work_dir
        self.writes = processes.first() if writes is None else writes
        self.every, self.clock = every, clock
        self.console = console or terminal(stderr=True)
        self._tensorboard, self._wandb = tensorboard, wandb
        self._file: TextIO | None = None
        self._events: Any = None
        self._run: Any = None
        self._bar: Progress | None = None
        self._shown = -math.inf
        self._first: tuple[int, float] | None = None
        self._latest: dict[str, float] = {}
        self._steps = 0

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

            if self.start == 0:  # curves of an earlier run with other settings
                shutil.rmtree(self.events_folder, ignore_errors=True)
            self._events = SummaryWriter(str(self.events_folder), purge_step=self.start + 1)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=False,
            )
            self._task = self._bar.add_task(visible(self.title), total=self.total, completed=self.start, metrics="")
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
        """Return W&B's id of this run. The id is stored in `work_dir`, so that a resumed run uses the same id."""
        file = self.work_dir / "wandb_id"
        if self.start == 0 or not file.exists():
            file.write_text(secrets.token_hex(8), encoding="utf-8")
        return file.read_text(encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line for `step` to the log and update the bar.

        Args:
          step: number of finished optimizer steps.
          metrics: scalars by name: numbers, or values that `float` accepts (arrays without dimensions). A value that is
            not finite is written as null, because JSON has no NaN.
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

    def log_layer(self, report: LayerReport) -> None:
        """Log the report of one layer of a calibration walk as the next step."""
        self.log_next({"layer": report.layer, "influence": report.influence, "layer_error": report.error})

    def log_next(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics as the next step of a stage without step numbers. An example is a calibration walk, which has a
        step per layer."""
        self._steps += 1
        self.log(self._steps, metrics)

    def _add_events(self, values: Mapping[str, Any], step: int) -> None:
        """Write metrics to TensorBoard.

        TensorBoard's writing thread ends if the disk is full, and its queue would then block the run. In this case the
        method prints a line and disables TensorBoard.
        """
        if not self._events:
            return
        if not self._events.file_writer.event_writer._worker.is_alive():
            self.say("TensorBoard events could not be written (is the disk full?); the run goes on without them")
            self._events = None
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Print one line above the bar, preceded by the title."""
        if self.writes:
            self.console.print(f"{self.title}: {text}", soft_wrap=True)

    def _show(self, step: int) -> None:
        shown = [(n, v) for n, v in self._latest.items() if n not in UNSHOWN]
        text = "  ".join(f"{SHORT.get(name, name)} {_brief(value)}" for name, value in shown)
        self._explain(SHORT.get(name, name) for name, _ in shown)
        if self._bar:
            self._bar.update(self._task, completed=step, total=self.total, metrics=text)
            return
        now = self.clock()
        first, began = self._first = self._first or (step, now)  # earlier time includes compilation
        if now - self._shown >= self.every or step >= self.total:
            self._shown = now
            left = (now - began) / (step - first) * (self.total - step) if step > first else 0
            self.say(f"step {step}/{self.total}  {text}{f'  ETA {_duration(left)}' if left else ''}")

    def _explain(self, names: Iterable[str]) -> None:
        """Print the meanings of metric names that this process has not explained before."""
        new = [name for name in names if name in MEANINGS and name not in _explained]
        _explained.update(new)
        if new:
            self.say("; ".join(f"{name}: {MEANINGS[name]}" for name in new))


def _forget_after(log: Path, step: int) -> None:
    """Remove the log lines of all steps after `step`, and an incomplete last line that a killed process left."""
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
    """Format a number with about four digits, such as 12,345, 3.142 or 1.0e-05."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    if value and math.isfinite(value) and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
