"""What the stages that train share: from their settings and rows to trained parameters and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llmctl.data.device_batches import row_shapes
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.setup import Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.model import flops
from llmctl.model.config import ModelConfig
from llmctl.model.losses import NEARNESS, Loss
from llmctl.train import loop
from llmctl.train.validation import Validation

if TYPE_CHECKING:
    from llmctl.artifacts.workspace import Context


def chooses(task: Task, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of `llmctl.train.step.Job` that keep the best parameters by the task's metric."""
    return {"metric": task.best(labels), "keep_best": True}


@dataclass(frozen=True)
class Learner:
    """What a stage trains, before there are rows: the arrays may be abstract."""

    model: ModelConfig
    """The network as it is left behind."""
    params: dict[str, Any]
    """Where to start."""
    task: Task
    """What it learns."""
    dropout: float | None = None
    """While training, instead of the network's own."""
    loss: Loss | None = None
    """Instead of the task's loss."""
    beside: ModelConfig | None = None
    """What runs forward beside the model (a teacher)."""
    temperature: float = NEARNESS
    """Divides the similarities of embeddings."""
    labels: Sequence[str] = ()
    """Names of its classes."""
    how: dict[str, Any] = field(default_factory=dict)
    """Further fields of `llmctl.train.step.Job`."""

    @property
    def trains(self) -> ModelConfig:
        """The network as it trains."""
        return self.model if self.dropout is None else self.model.model_copy(update={"dropout": self.dropout})


def job(config: Any, learner: Learner, rows: Any, validate: Any) -> loop.Job:
    """The job of a stage with settings `train`; `validate` as in Job."""
    settings, model = config.train, learner.trains
    own = learner.task.loss_of(
        model,
        dtype=jnp.dtype(settings.dtype),
        remat=settings.remat,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        temperature=learner.temperature,
    )
    beside = flops.of_rows(learner.beside, row_shapes(rows)) if learner.beside else 0.0
    return loop.Job(
        params=learner.params,
        loss=learner.loss or own,
        model=model,
        flops=3 * flops.of_rows(model, row_shapes(rows)) + beside,
        rows=rows,
        validate=validate,
        **learner.how,
    )


def run(
    config: Any, ctx: Context, mesh: jax.sharding.Mesh, learner: Learner, rows: Any, unseen: Any
) -> tuple[dict[str, Any], dict[str, Any], Validation]:
    """Trains by a stage's settings: (parameters, metrics, the validation that they were measured with).

    Args:
      config: the stage's, with `title`, `seed`, `train` and `optim`.
      ctx: where checkpoints and the log go.
      mesh: the devices.
      learner: what to train.
      rows: what to learn from.
      unseen: what to validate on.

    Raises:
      Interrupted, WorkError: as `llmctl.train.loop.fit`.
    """
    settings = config.train
    judge = learner.task.loss_of(
        learner.trains,
        dtype=jnp.dtype(settings.dtype),
        temperature=learner.temperature,
        labels=learner.labels,
    )
    held_out = Validation(judge, unseen, settings.batch_size, settings.eval_batches, mesh)
    made = job(config, learner, rows, held_out)
    params, metrics = loop.fit(made, settings, config.optim, mesh, ctx, config.seed, config.title)
    return params, metrics, held_out


def fitted(config: Any, learner: Learner, params: dict[str, Any], held_out: Validation) -> dict[str, Any]:
    """Return what the task chooses with trained parameters on all validation rows, for the artifact's manifest."""
    train, mesh = config.train, held_out.mesh
    setup = Setup(mesh, train.seq_len, train.seq_len, held_out.batches.size, config.truncate, train.dtype)
    with meshes.use(mesh):
        return learner.task.fit(learner.model, params, held_out.rows, setup)
