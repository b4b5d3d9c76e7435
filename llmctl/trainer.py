"""What the stages that train share: from their settings and rows to trained parameters and their validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llmctl import train
from llmctl.model import ModelConfig, cost
from llmctl.model.loss import Loss, loss_of
from llmctl.validation import Validation

if TYPE_CHECKING:
    from llmctl.stages import Context


BY_ACCURACY = {"metric": "accuracy", "maximize": True, "keep_best": True}
BY_LOSS = {"metric": "loss", "maximize": False, "keep_best": True}
CHOOSES = {"classify": BY_ACCURACY}
"""By head: what the best parameters of a task are chosen by; the loss where nothing is said."""


def run(
    config: Any,
    ctx: Context,
    mesh: jax.sharding.Mesh,
    *,
    model: ModelConfig,
    params: dict[str, Any],
    rows: Any,
    unseen: Any,
    loss: Loss | None = None,
    beside: float = 0.0,
    **how: Any,
) -> tuple[dict[str, Any], dict[str, Any], Validation]:
    """Trains by a stage's settings: (parameters, metrics, the validation that they were measured with).

    Args:
      config: the stage's, with `title`, `seed`, `train` and `optim`.
      ctx: where checkpoints and the log go.
      mesh: the devices.
      model: the network as it trains, dropout included.
      params: where to start.
      rows: what to learn from.
      unseen: what to validate on.
      loss: instead of the loss of the model's head.
      beside: FLOPs a token of what runs beside the model (a teacher).
      how: further fields of `llmctl.step.Job`.

    Raises:
      Interrupted, WorkError: as `llmctl.train.fit`.
    """
    settings, dtype = config.train, jnp.dtype(config.train.dtype)
    held_out = Validation(loss_of(model, dtype=dtype), unseen, settings.batch_size, settings.eval_batches, mesh)
    own = loss_of(
        model,
        dtype=dtype,
        remat=settings.remat,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
    )
    job = train.Job(
        params=params,
        loss=loss or own,
        model=model,
        flops=3 * cost.of_rows(model, shapes(rows)) + beside,
        rows=rows,
        validate=held_out,
        **how,
    )
    params, metrics = train.fit(job, settings, config.optim, mesh, ctx, config.seed, config.title)
    return params, metrics, held_out


def shapes(rows: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each array of a row."""
    return {name: a.shape for name, a in rows[0].items()}
