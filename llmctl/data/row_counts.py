"""Compute the numbers of rows and steps that the training settings require."""

from __future__ import annotations

import math

from llmctl.config.settings import TrainConfig


def training_rows(train: TrainConfig) -> int:
    """Return the number of rows that a training run reads, or 0 if `train.epochs` determines this number."""
    return 0 if train.epochs else train.steps * train.batch_size


def with_steps(train: TrainConfig, rows: int) -> TrainConfig:
    """Return the settings with the number of steps for `train.epochs` epochs of `rows` rows, at least one step.

    >>> with_steps(TrainConfig(epochs=3, batch_size=32), rows=1000).steps
    94
    """
    if not train.epochs:
        return train
    steps = max(1, math.ceil(train.epochs * rows / train.batch_size - 1e-9))
    return train.model_copy(update={"steps": steps, "epochs": 0.0})


def validation_rows(train: TrainConfig) -> int:
    """Return the maximum number of rows of one validation."""
    return train.eval_batches * train.batch_size
