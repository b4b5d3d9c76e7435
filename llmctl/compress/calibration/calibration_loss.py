"""Compute the mean loss of a model on calibration batches, to compare compressed models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.base import Task
from llmctl.model.config import ModelConfig


def loss_program(task: Task, cfg: ModelConfig, dtype: Any) -> Any:
    """Return a compiled function that measures the loss of a model on one batch.

    Its arguments are the parameters and the batch. It returns two sums over tokens (or examples), float32 [2]: of the
    weighted losses, and of the weights. The first sum divided by the second is the mean loss.
    """
    loss = task.loss_of(cfg, dtype=dtype)

    def run(params: dict[str, Any], batch: dict[str, Any]) -> jax.Array:
        total, found = loss(params, batch)
        return jnp.stack([total, found["weight"]]).astype(jnp.float32)

    return jax.jit(run)


def mean_loss(program: Callable[..., jax.Array], params: dict[str, Any], batches: Sequence[dict[str, Any]]) -> float:
    """Return the mean loss on all batches.

    Args:
      program: function that `loss_program` returns.
      params: parameters of the model.
      batches: calibration batches with labels or targets.

    Raises:
      RequestError: If the batches have no labels or targets.
    """
    total = np.zeros(2)
    for batch in batches:
        total += np.asarray(program(params, batch), float)
    if not total[1]:
        raise RequestError("calibration has no labels or targets: a budget is met by the loss that they give")
    return float(total[0] / total[1])
