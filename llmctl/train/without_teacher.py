"""Train the student of a distillation once more without its teacher, and compare the learning curves of both trainings.

Both trainings have the same settings, seed, steps and initial parameters. Without the teacher, the loss is that of the
task on the labels of the data. Only the log and the metrics of this training are kept.

    alone = trained(config, ctx, mesh, learner, rows, unseen)
    ...  # train with the teacher
    files, found = report(config, ctx, learner, metrics, alone, say=print)
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.distributed import processes
from llmctl.evaluate.metrics.base import METRICS, find
from llmctl.train import learner as training
from llmctl.train.run_log import LOG
from llmctl.train.seeds import PREFIX, with_nan

if TYPE_CHECKING:
    import jax

    from llmctl.artifacts.workspace import Context
    from llmctl.train.learner import Learner

FOLDER = "without-teacher"
"""Name of the folder with the log and the metrics of the training without a teacher, in the stage's temporary
folder."""
RESULT = "metrics.json"
TITLE = "train step without teacher"
"""Title of the training step in a plan."""
CURVES = "curves.json"
"""Name of the artifact's file with two learning curves: training with the teacher, and without."""

Curve = list[dict[str, float]]
"""Validation metrics by name, and "step", of each validation of a training."""


def learner_of(taught: Learner) -> Learner:
    """Return the Learner (model to train) of the same student with the loss of its task, which reads no teacher."""
    own = {name: value for name, value in taught.job_fields.items() if name != "constants"}
    return dataclasses.replace(taught, loss=None, beside=(), job_fields=own, step_fields=lambda params, steps: {})


def trained(
    config: Any, ctx: Context, mesh: jax.sharding.Mesh, taught: Learner, rows: Any, unseen: Any
) -> dict[str, Any]:
    """Train the student on the labels alone, and return its metrics. The parameters are discarded.

    An interrupted training is resumed. A finished training is not repeated.

    Args:
      config: config of the stage `distill`.
      ctx: folders of the stage.
      mesh: the devices.
      taught: the student and its distillation loss. Its arrays are donated.
      rows: training rows, with labels and without outputs of a teacher.
      unseen: validation rows.
    """
    own = dataclasses.replace(ctx, work=ctx.work / FOLDER, logs=ctx.logs or ctx.out.parent)
    done = own.work / RESULT
    if not processes.broadcast(done.exists):
        processes.broadcast(lambda: own.work.mkdir(exist_ok=True))
        alone = config.model_copy(update={"name": f"{config.title}-{FOLDER}"})
        metrics = training.run(alone, own, mesh, learner_of(taught), rows, unseen)[1]
        if processes.first():
            draft = done.with_suffix(".draft")
            draft.write_text(json.dumps(metrics))
            draft.replace(done)
            shutil.rmtree(own.work / "checkpoints", ignore_errors=True)  # they are as large as the student's own
        processes.barrier("trained without teacher")
    return processes.broadcast(lambda: json.loads(done.read_text()))


def curve(work: Path) -> Curve:
    """Return the learning curve in the log of a training: the metrics of each validation, by ascending step."""
    lines = (json.loads(line) for line in (work / LOG).read_text(encoding="utf-8").splitlines())
    return [
        {"step": line["step"]} | {n: v for n, v in with_nan(line).items() if n.startswith(PREFIX)}
        for line in lines
        if any(name.startswith(PREFIX) for name in line)
    ]


def complete(found: Curve, metrics: Mapping[str, Any]) -> Curve:
    """Return a learning curve with the final validation. The log lacks this validation if `train.eval_every` is 0.

    >>> complete([], {"steps": 50, "tokens": 900, "validation_loss": 1.5})
    [{'step': 50, 'validation_loss': 1.5}]
    """
    if found and found[-1]["step"] == metrics["steps"]:
        return found
    final = {n: v for n, v in metrics.items() if n.startswith(PREFIX) and isinstance(v, (int, float))}
    return [*found, {"step": metrics["steps"], **final}]


def compared(alone: Mapping[str, Any], curve_taught: Curve, metric: str) -> dict[str, Any]:
    """Return the metrics of training without a teacher, and the step at which training with a teacher is as good.

    Args:
      alone: metrics of the training without a teacher.
      curve_taught: learning curve of the training with the teacher.
      metric: name of the metric that is compared, such as "loss".

    Returns:
      Metrics of `alone`, and:

      - "metric": the argument `metric`
      - "equal_step": first step at which training with the teacher reaches the final value of training without it. None
        if no validation reaches this value

    >>> curve = [{"step": 10, "validation_loss": 2.0}, {"step": 20, "validation_loss": 1.4}]
    >>> compared({"steps": 50, "validation_loss": 1.5}, curve, "loss")["equal_step"]
    20
    """
    name, sign = PREFIX + metric, 1 if METRICS[metric].better == "minimize" else -1
    goal = sign * float(alone.get(name, math.nan))
    reached = (one["step"] for one in curve_taught if sign * one.get(name, math.nan) <= goal)
    return {**alone, "metric": metric, "equal_step": next(reached, None)}


def report(
    config: Any, ctx: Context, learner: Learner, taught: Mapping[str, Any], alone: Mapping[str, Any], say: Any
) -> tuple[list[Path], dict[str, Any]]:
    """Print a comparison of training with and without a teacher, and write both learning curves.

    Args:
      config: config of the stage `distill`.
      ctx: folders of the stage.
      learner: the student.
      taught: metrics of the training with the teacher.
      alone: metrics of the training without a teacher, the result of `trained`.
      say: function that prints one line.

    Returns:
      (files to copy into the artifact, the result of `compared`).
    """
    metric = config.train.best_by or learner.task.best(learner.labels)

    def measured() -> list[Any]:
        curves = complete(curve(ctx.work), taught), complete(curve(ctx.work / FOLDER), alone)
        return [[str(file) for file in written(ctx.work, *curves, metric)], compared(alone, curves[0], metric)]

    files, found = processes.broadcast(measured)
    say(sentence(found, taught))
    return [Path(file) for file in files], found


def sentence(found: Mapping[str, Any], taught: Mapping[str, Any]) -> str:
    """Format the comparison of training with and without the teacher as a log line.

    Args:
      found: result of `compared`.
      taught: metrics of the training with the teacher.

    >>> sentence({"metric": "loss", "equal_step": 20, "validation_loss": 1.5}, {"validation_loss": 1.2, "steps": 50})
    'loss 1.2000, without the teacher 1.5000; as good as that after 20 of 50 steps'
    """
    metric, name = METRICS[found["metric"]], PREFIX + found["metric"]
    line = f"{metric.title} {metric.text(taught[name]).strip()}, without the teacher {metric.text(found[name]).strip()}"
    if found["equal_step"] is None:
        return f"{line}; not as good as that at any validation"
    return f"{line}; as good as that after {found['equal_step']:,} of {taught['steps']:,} steps"


def table(taught: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    """Return a table that compares training with and without the teacher: steps, tokens, and validation metrics."""
    out = Table(title="the student with and without its teacher", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "with", "without"):
        out.add_column(heading, justify="right" if heading else "left")
    counts = [name for name in ("steps", "best_step", "tokens", "teacher_tokens") if name in taught]
    for name in counts:
        out.add_row(name.replace("_", " "), *(f"{m[name]:,}" if name in m else "" for m in (taught, found)))
    for name in found:
        metric = find(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if metric and name in taught:
            out.add_row(metric.title, *(metric.text(m[name]) for m in (taught, found)))
    return out


def written(folder: Path, with_teacher: Curve, without: Curve, metric: str) -> Sequence[Path]:
    """Write the learning curves of training with and without the teacher to a folder, and return the files.

    The files are JSON data and, if matplotlib is installed, a picture.
    """
    from llmctl.train import curves_plot

    def finite(one: Mapping[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in one.items()}

    both = {"with_teacher": with_teacher, "without_teacher": without}
    file = folder / CURVES
    file.write_text(json.dumps({name: [finite(one) for one in each] for name, each in both.items()}, indent=1) + "\n")
    try:
        curves_plot.plot(
            {name.replace("_", " "): each for name, each in both.items()},
            PREFIX + metric,
            picture := folder / "curves.png",
        )
    except ImportError:  # the picture is an extra
        return [file]
    return [file, picture]
