"""Train a model, given the settings and rows of a training command, and return parameters and validation metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llmctl.config.errors import RequestError
from llmctl.data import padding
from llmctl.data.device_batches import row_shapes
from llmctl.data.pretraining.lm_corpus import check_epochs
from llmctl.data.row_counts import training_rows, with_steps
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.setup import Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import flops
from llmctl.model.config import ModelConfig
from llmctl.model.losses import COSINE_TEMPERATURE, Loss
from llmctl.train import fake_quantize, loop, sparsify
from llmctl.train.validation import Further, Validation

if TYPE_CHECKING:
    from llmctl.artifacts.workspace import Context
    from llmctl.config.settings import TrainConfig
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.tokenizers.base import Tokenizer


def selection_fields(task: Task, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return job fields that make training keep the parameters with the best value of the task's metric.

    The result has fields of `llmctl.train.job.Job`, by name.
    """
    return {"metric": task.best(labels), "keep_best": True}


@dataclass(frozen=True)
class Learner:
    """Describe the model, the task and the options of a training run, without its data. The arrays may be abstract."""

    model: ModelConfig
    """Config of the model that is trained and saved."""
    params: dict[str, Any]
    """Initial parameters of the model."""
    task: Task
    """Task that the model is trained for."""
    dropout: float | None = None
    """Dropout rate in training; None uses the rate of the model's config."""
    loss: Loss | None = None
    """Loss function; None uses the loss of the task."""
    beside: Sequence[ModelConfig] = ()
    """Configs of other models, such as teachers, whose forward passes run in each step."""
    temperature: float = COSINE_TEMPERATURE
    """Temperature of embedding losses: the divisor of the similarities between embeddings."""
    settings: Any = None
    """Settings that only the task reads: the section of the config whose name is `task.section`."""
    labels: Sequence[str] = ()
    """Names of the classes; empty if the task has no classes."""
    job_fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of the training job (`llmctl.train.job.Job`), by name."""
    step_fields: Callable[[dict[str, Any], int], dict[str, Any]] = lambda params, steps: {}
    """Function that returns further fields of the training job, by name. Its arguments are the initial parameters and
    the number of training steps.
    """
    adapt_job: Callable[[loop.Job, int], loop.Job] = lambda job, steps: job
    """Function that returns the job to run. Its arguments are the job and the number of steps. The function may, for
    example, replace the loss. By default the function returns the job unchanged.
    """

    @property
    def training_model(self) -> ModelConfig:
        """Return the config of the model in training, with the dropout rate of this learner."""
        return self.model if self.dropout is None else self.model.model_copy(update={"dropout": self.dropout})

    def options(self, train: TrainConfig) -> dict[str, Any]:
        """Return the options of the training loss: the fields of `llmctl.evaluate.tasks.losses.Options`, by name."""
        return {
            "dtype": jnp.dtype(train.dtype),
            "label_smoothing": train.label_smoothing,
            "z_loss": train.z_loss,
            "temperature": self.temperature,
            "settings": self.settings,
        }


def job(config: Any, learner: Learner, rows: Any, validate: Any, steps: int) -> loop.Job:
    """Return the Job (description of a training run) for a model and its rows.

    Args:
      config: config of the training command. Only the sections `train`, `sparsify` and `fake_quantize` are
        read.
      learner: the model and its task.
      rows: training rows.
      validate: function from parameters to metrics.
      steps: number of training steps.
    """
    settings, model = config.train, learner.training_model
    own = learner.task.loss_of(model, remat=settings.remat, **learner.options(settings))
    beside = sum(flops.of_rows(other, row_shapes(rows)) for other in learner.beside)
    made = loop.Job(
        params=learner.params,
        loss=learner.loss or own,
        model=model,
        flops=(3 + learner.task.extra_passes(learner.settings)) * flops.of_rows(model, row_shapes(rows)) + beside,
        rows=rows,
        validate=validate,
        **learner.job_fields,
        **learner.step_fields(learner.params, steps),
    )
    made = learner.adapt_job(sparsify.attached(config.sparsify, made, steps), steps)
    return fake_quantize.attached(config.fake_quantize, made)


def with_length(config: Any, rows: Any) -> tuple[TrainConfig, list[str]]:
    """Return (`config.train` with its number of steps, log lines).

    If `train.epochs` is set, the epochs determine the number of steps, and a log line reports this number. Otherwise
    there are no log lines.

    Raises:
      RequestError: If the data settings also limit the epochs, or the data has fewer rows than all steps need.
    """
    settings = with_steps(config.train, len(rows))
    if not config.train.epochs:
        return settings, []
    if any(part.epochs for part in config.data.parts()):
        raise RequestError("train.epochs and data.epochs exclude each other: set train.steps, or leave data.epochs")
    total = getattr(rows, "total", None)  # prepared sources have their own epochs
    if total is not None:
        check_epochs(settings.steps * settings.batch_size, total)
    passes = f"{config.train.epochs:g} epochs of {len(rows):,} rows"
    return settings, [f"{passes} in batches of {settings.batch_size}: {settings.steps:,} steps"]


def rows_of(
    config: Any,
    learner: Learner,
    text: Text,
    split: str,
    tokens: Tokenizer,
    cache: Path,
    *,
    shuffle: bool,
    needed: int = 0,
) -> Any:
    """Return the rows of a split for training or validation.

    Args:
      config: config of the training command, with `train`, `seed` and `truncate`.
      learner: the model and its task.
      text: the data.
      split: "train" or "validation".
      tokens: tokenizer.
      cache: folder in which the tokens are stored.
      shuffle: whether each epoch has another order.
      needed: number of rows that are read; 0 if it is not known.
    """
    settings = RowSettings(config.train.seq_len, shuffle, config.seed, config.truncate)
    return learner.task.stage_rows(learner.model, text, split, tokens, cache, settings, needed)


def rows_of_splits(config: Any, learner: Learner, text: Text, tokens: Tokenizer, cache: Path) -> tuple[Any, Any]:
    """Return (training rows, validation rows). The arguments are those of `rows_of`."""
    needed = training_rows(config.train)
    train = rows_of(config, learner, text, "train", tokens, cache, shuffle=True, needed=needed)
    return train, rows_of(config, learner, text, "validation", tokens, cache, shuffle=False)


def run(
    config: Any,
    ctx: Context,
    mesh: jax.sharding.Mesh,
    learner: Learner,
    rows: Any,
    unseen: Any,
    further: Further | None = None,
) -> tuple[dict[str, Any], dict[str, Any], Validation]:
    """Train a model and return its parameters, their metrics, and the object that computed the metrics.

    Args:
      config: config of the training command, with `title`, `seed`, `train`, `optim`, `sparsify` and
        `fake_quantize`.
      ctx: folders of checkpoints and the log.
      mesh: the devices.
      learner: the model and its task.
      rows: training rows.
      unseen: validation rows.
      further: function that computes further validation metrics.

    Returns:
      (parameters, metrics by name, the Validation that computed the metrics).

    Raises:
      Interrupted: If SIGTERM or Ctrl-C arrived.
      WorkError: If the run diverges or the disk is full.
    """
    settings, about = with_length(config, rows)
    note = learner.task.validation_note(learner.model, unseen)
    about = [*getattr(rows, "log_lines", ()), *padding.describe(rows), *about, *filter(None, [note])]
    judge = learner.task.loss_of(
        learner.training_model,
        dtype=jnp.dtype(settings.dtype),
        temperature=learner.temperature,
        labels=learner.labels,
        settings=learner.settings,
    )
    held_out = Validation(judge, unseen, settings.batch_size, settings.eval_batches, mesh, further)
    made = job(config, learner, rows, held_out, settings.steps)
    params, metrics = loop.fit(made, settings, config.optim, mesh, ctx, config.seed, config.title, about)
    return params, metrics | sparsify.result_metrics(config.sparsify, params), held_out


def calibrated(
    config: Any, learner: Learner, params: dict[str, Any], held_out: Validation
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Calibrate the class probabilities on the validation rows. Return (parameters, validation metrics of these
    parameters).
    """
    with meshes.use(held_out.mesh):
        setup = _setup(config, held_out)
        params, found = learner.task.calibrated(learner.model, params, held_out.rows, setup)
    return params, {f"validation_{k}": v for k, v in (held_out(params) | found).items()}


def fitted(config: Any, learner: Learner, params: dict[str, Any], held_out: Validation) -> dict[str, Any]:
    """Return values that the task fits on the validation rows after training, such as classification thresholds.

    The values are saved with the model.
    """
    with meshes.use(held_out.mesh):
        params = fake_quantize.rounded(config.fake_quantize, params)
        rows = getattr(held_out.rows, "bare", held_out.rows)  # outputs of a teacher may be stored for some rows only
        return learner.task.fit(learner.model, params, rows, _setup(config, held_out))


def _setup(config: Any, held_out: Validation) -> Setup:
    """Return the settings with which `evaluate` computes metrics on all validation rows."""
    train = config.train
    return Setup(held_out.mesh, train.seq_len, train.seq_len, held_out.batches.size, config.truncate, train.dtype)
