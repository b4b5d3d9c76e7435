"""Define the settings of pruning during training, the section `sparsify` of every training stage.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmctl.compress.pruning.pattern import Pattern
from llmctl.config.base import Config
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig, portion


class SparsifyConfig(Config):
    """Set pruning during training: weights of the layers' matrices become zero, and the other weights adapt.

    >>> SparsifyConfig(sparsity=0.8, end=0.5).steps(1000)
    (0, 500, 10)
    """

    common: ClassVar[tuple[str, ...] | None] = ()

    sparsity: float = Field(default=0.0, ge=0, lt=1)
    """Prune during training: set this fraction of each matrix in the layers to zero. 0 prunes nothing, unless the
    pattern is N:M. Later stages keep the zeros."""
    schedule: Literal["cubic", "once", "constant"] = "cubic"
    """Sparsity by step. cubic: rise from 0 at step `start` to the full sparsity at step `end`, fast at first. once:
    prune at step `end`. constant: full sparsity from step `start` on."""
    score: Literal["magnitude", "movement"] = "magnitude"
    """Score of the weights. Weights with the lowest scores become zero. magnitude: absolute value. Zeros stay zero.
    movement: sum over steps of -weight * gradient, which is high for weights that move away from zero. Until step
    `end`, zeros may return to their last nonzero value. The score `movement` needs 8 more bytes per weight."""
    pattern: str = "unstructured"
    """Pattern of the zeros. unstructured: zeros at any position. N:M, such as 2:4: keep N of every M inputs. N and M
    determine the sparsity. AxB, such as 128x1: blocks of A inputs and B outputs."""
    start: float = Field(default=0.0, ge=0)
    """Step after which weights become zero, if the schedule is `cubic` or `constant`. A value below 1 is a fraction of
    all steps."""
    end: float = Field(default=0.75, gt=0)
    """Step from which the zeros no longer change. A value up to 1 is a fraction of all steps. Only parameters from this
    step on can be selected as the best, and train.patience counts from this step. If the schedule is `constant` and the
    score is `magnitude`, the zeros no longer change after step `start`."""
    every: float = Field(default=0.01, gt=0)
    """Number of steps between changes of the zeros. A value below 1 is a fraction of all steps."""

    @model_validator(mode="after")
    def _fits(self) -> SparsifyConfig:
        given = self.model_fields_set
        try:
            own = Pattern.parse(self.pattern, self.sparsity or 0.5).sparsity
        except RequestError as e:
            raise ValueError(str(e)) from None
        if self.sparsity and abs(self.sparsity - own) > 1e-9:
            raise ValueError(f"sparsity {self.sparsity} contradicts pattern {self.pattern}, which has {own:g}")
        if not self.active:
            if stray := sorted(given - {"sparsity"} - ({"pattern"} if self.pattern == "unstructured" else set())):
                raise ValueError(f"{', '.join(stray)}: prune nothing without a sparsity; set sparsity, such as 0.8")
            return self
        unread: set[str] = set()
        if self.schedule == "once":
            unread = {"start", "every"}
        elif self.schedule == "constant" and self.score == "magnitude":
            unread = {"end", "every"}
        if stray := sorted(given & unread):
            raise ValueError(
                f"{', '.join(stray)}: not for schedule {self.schedule!r} with score {self.score!r}, which chooses the "
                "zeros once; leave it out"
            )
        return self

    @property
    def active(self) -> bool:
        """Return whether these settings prune during training."""
        return bool(self.sparsity) or ":" in self.pattern

    @property
    def pruned(self) -> bool | None:
        """Return True if the result is a pruned artifact. If this depends on the parent, return None."""
        return self.active or None

    @property
    def zeros(self) -> Pattern:
        """Return the sparsity pattern of the result."""
        return Pattern.parse(self.pattern, self.sparsity)

    def steps(self, total: int) -> tuple[int, int, int]:
        """Return (start, end, every) in steps of a run of `total` steps.

        If the schedule is `constant` and the score is `magnitude`, the zeros are chosen once. `end` is then 1 step
        after `start`.

        Raises:
          RequestError: If no step is left between `start` and `end`, or `end` is after the last step.
        """
        start = portion(self.start, total)
        end = max(round(self.end * total), 1) if self.end <= 1 else round(self.end)
        if self.schedule == "constant" and self.score == "magnitude":
            end = start + 1
        if self.schedule == "once":
            start = end - 1
        if not start < end <= total:
            raise RequestError(
                f"sparsify: start is step {start:,} and end is step {end:,} of {total:,}; start must be before end, "
                "and end not after the last step"
            )
        return start, end, max(portion(self.every, total), 1)


def check(config: Any) -> None:
    """Check that the other settings of a training stage allow pruning. `config` has `sparsify`, `train` and `optim`.

    Raises:
      ValueError: If a setting does not allow pruning.
    """
    asked: SparsifyConfig = config.sparsify
    train: TrainConfig = config.train
    optim: OptimConfig = config.optim
    if not asked.active:
        return
    if optim.spike:
        raise ValueError(
            "optim.spike: not with sparsify, because new zeros raise the loss and their steps would be skipped; leave "
            "one of them out"
        )
    if not train.epochs:
        try:
            asked.steps(train.steps)
        except RequestError as e:
            raise ValueError(str(e)) from None
