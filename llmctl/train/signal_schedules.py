"""Change the weights of distillation losses during training.

A weight such as `signals.hidden = { from = 1.0, to = 0.0, steps = 0.5 }` changes linearly. Row i of the training rows
is read in step i // batch_size. The rows therefore contain the weights of their step, which the compiled loss reads.

    rows = ScheduledRows(rows, config, steps=1000)
    rows.batch(numbers)["signal_hidden"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmctl.data.pretraining.packing import Batch
from llmctl.data.wrapped_rows import WrappedRows


def weight_at(schedule: Mapping[str, float], step: np.ndarray, steps: int) -> np.ndarray:
    """Return the weight of a signal in each step, float32.

    Args:
      schedule: first weight "from", last weight "to", and the number of "steps" of the change. A value of "steps" below
        1 is a fraction of all steps. By default, the change takes all steps.
      step: steps, from 0.
      steps: number of training steps.

    >>> weight_at({"from": 1.0, "to": 0.0, "steps": 0.5}, np.arange(5), 8).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    length = schedule.get("steps", steps)
    length = length * steps if length < 1 else length
    share = np.minimum(step / length, 1.0)
    return (schedule["from"] + (schedule["to"] - schedule["from"]) * share).astype(np.float32)


class ScheduledRows(WrappedRows):
    """Add the weights of signals to training rows, as arrays "signal_NAME" [B]. All other attributes are read from
    `rows`.

    Args:
      rows: training rows.
      config: config of the stage `distill`.
      steps: number of training steps.
    """

    def __init__(self, rows: Any, config: Any, steps: int) -> None:
        super().__init__(rows)
        self._size, self._steps = config.train.batch_size, steps
        self._schedules: dict[str, Mapping[str, float]] = config.signals.schedules

    def added(self, rows_B: np.ndarray, batch: Batch) -> Batch:
        """Return the weights of the signals in the steps of the rows `rows_B`."""
        return {
            f"signal_{name}": weight_at(schedule, rows_B // self._size, self._steps)
            for name, schedule in self._schedules.items()
        }
