"""Select the best parameters of a training run by a validation metric, and decide when to stop early.

The metadata of a checkpoint contains the state of the selection:

- "best": the best value so far
- "best_step": the step of this value
- "bad": the number of validations since this step
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.config.settings import TrainConfig
from llmctl.evaluate.metrics.base import METRICS
from llmctl.train.checkpoints import Checkpoints
from llmctl.train.job import Job, Params


class BestParameters:
    """Select the best parameters so far. They are saved only if the run returns the best parameters in place of the
    last."""

    def __init__(self, job: Job, train: TrainConfig, checkpoints: Checkpoints, say: Callable[[str], None]) -> None:
        self.metric = train.best_by or job.metric
        self.minimized = is_minimized(self.metric)
        self.keeps = job.keep_best or bool(train.best_by)
        """Whether the run returns the best parameters instead of the last parameters."""
        self.first, self.patience = job.best_from, train.patience
        self.checkpoints, self.say = checkpoints, say

    def restored(self, named: Params, meta: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata of a restored checkpoint, corrected if the best parameters are missing on disk.

        The best parameters are missing if the run was killed during their save. If the best step is the step of the
        checkpoint, the parameters `named` are saved again. Otherwise the best metric is removed from `meta`. The reason
        is that the resumed run may not reach this value again, because rounding differs on another mesh.
        """
        best = meta["best_step"]
        if not self.keeps or best is None or self.checkpoints.has_best(best):
            return meta
        if best == meta["step"]:
            self.checkpoints.save_best(best, named)
            return meta
        self.say(f"the best parameters so far, of step {best}, are gone; the best is looked for from here on")
        return {**meta, "best": None, "best_step": None, "bad": 0}

    def updated(self, done: int, found: dict[str, float], named: Params, meta: dict[str, Any]) -> dict[str, Any]:
        """Return the checkpoint metadata after a validation, and save the parameters if they are the best.

        Args:
          done: number of finished steps.
          found: validation metrics by name.
          named: the validated arrays, by name.
          meta: metadata before the validation.

        Raises:
          RequestError: If the validation does not compute the metric that selects the best parameters.
        """
        if self.metric not in found:
            raise RequestError(f"train.best_by: no metric {self.metric!r} here; there are {', '.join(sorted(found))}")
        if done < self.first:
            return meta
        value = found[self.metric]
        if meta["best"] is None or improves(value, meta["best"], self.minimized):
            if self.keeps:
                self.checkpoints.save_best(done, named)
            return {**meta, "best": value, "best_step": done, "bad": 0}
        bad = meta["bad"] + 1
        stopped = bool(self.patience) and bad >= self.patience
        if stopped:
            self.say(
                f"step {done}: {bad} validations without a better {self.metric} than {meta['best']:.4g}; stopping early"
            )
        return {**meta, "bad": bad, "stopped": stopped}


def improves(value: float, best: float, minimized: bool) -> bool:
    """Return whether a metric's value is better than the best value so far. Every number is better than NaN.

    >>> improves(0.5, 0.7, True), improves(9.0, math.nan, True), improves(math.nan, 0.7, False)
    (True, True, False)
    """
    return (math.isnan(best) and not math.isnan(value)) or (value < best if minimized else value > best)


def is_minimized(metric: str) -> bool:
    """Return whether the lowest value of a metric is the best.

    Raises:
      RequestError: If the metric is unknown, or has no direction of improvement.
    """
    try:
        record = METRICS[METRICS.check(metric)]
    except ValueError as e:
        raise RequestError(f"train.best_by: {e}") from None
    if record.better == "neither":
        raise RequestError(f"train.best_by: {metric} has no better direction, so it cannot choose the best parameters")
    return record.better == "minimize"
