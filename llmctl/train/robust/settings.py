"""Settings of robust finetuning, each a section of `finetune`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmctl.config.base import Config as Settings
from llmctl.config.base import spelled
from llmctl.train.robust.registry import ADVERSARIES

Positive = Annotated[float, Field(gt=0)]
Norm = Literal["", "l2", "linf"]


def _known(name: str) -> str:
    return name and ADVERSARIES.check(name)


def _weights(value: Any) -> Any:
    """Return weights of classes, or "balanced"."""
    if value == "balanced":
        return value
    numbers = isinstance(value, dict) and all(isinstance(v, (int, float)) and v > 0 for v in value.values())
    if not numbers:
        raise ValueError(f'must be "balanced" or a table of numbers above 0 by class, got {spelled(value)}')
    return {name: float(v) for name, v in value.items()}


class AdversarialConfig(Settings):
    """Adversarial training: perturb token embeddings of each row so that the loss grows. Sizes are relative to them.

    A size of 1 is the root mean square of the entries of the row's own embeddings.
    """

    common: ClassVar[tuple[str, ...] | None] = ()

    method: Annotated[str, AfterValidator(_known), ADVERSARIES] = ""
    """Adversarial training. fgm: clean rows, and rows one step along the gradient. pgd: rows after several steps.
    freelb: the mean over the steps, at the cost of one pass per step. smart: clean rows, with outputs that change
    little under perturbation and from step to step. Default: none."""
    epsilon: Positive | None = None
    """Maximum norm of a row's perturbation. Default: 5; smart: 1."""
    norm: Norm = ""
    """Norm: l2 of all of a row's entries, or linf, the largest entry. Default: l2; smart: linf."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """pgd, freelb, smart: steps of the search for a perturbation. Default: 3; smart: 1."""
    step_size: Positive | None = None
    """pgd, freelb, smart: length of a step, in the norm. Default: 2; smart: 1."""
    start: Annotated[float, Field(ge=0)] | None = None
    """pgd, freelb, smart: maximum norm of the random perturbation before the first step. Default: 5 (pgd), 3 (freelb),
    0.01 (smart), and at most epsilon."""
    weight: Positive | None = None
    """fgm, pgd: weight of perturbed rows in the loss, at most 1; clean rows have the rest. Default: 0.5 (fgm), 1 (pgd).
    smart: factor of the divergence between outputs of clean and perturbed rows. Default: 2."""
    proximal: Annotated[float, Field(ge=0)] | None = None
    """smart: factor of the divergence from the outputs of averaged weights. Default: 2."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """smart: decay of the average of weights, at most 0.99 in the first tenth of the steps. Default: 0.999."""

    @model_validator(mode="after")
    def _is_read(self) -> AdversarialConfig:
        given = [name for name, value in self if name != "method" and value not in (None, "")]
        if not self.method:
            if given:
                raise ValueError(f"{given[0]}: nothing is perturbed without a method, such as method = 'freelb'")
            return self
        reads = ADVERSARIES[self.method].reads
        if stray := [name for name in given if name not in reads]:
            raise ValueError(f"{stray[0]}: not for method {self.method!r}, which reads {', '.join(reads)}")
        ADVERSARIES[self.method].check(self)
        return self


class RegularizeConfig(Settings):
    """Regularization of finetuning, and weights of classes."""

    common: ClassVar[tuple[str, ...] | None] = ()

    r_drop: float = Field(default=0.0, ge=0)
    """Factor of the divergence between the outputs of two passes with different dropout (R-Drop); 0 is off."""
    neftune: float = Field(default=0.0, ge=0)
    """Uniform noise on token embeddings: alpha / sqrt(tokens * width), alpha = 5 is usual (NEFTune); 0 is off."""
    l2_start: float = Field(default=0.0, ge=0)
    """Factor of half the squared distance from the parent's weights (L2-SP); 0 is off. The task's head is left out."""
    class_weights: Annotated[Any, AfterValidator(_weights)] = {}
    """Weights of examples by class, such as {"rare" = 5.0}; others have 1. balanced: inverse to the class's share of
    the training rows."""
    balance: bool = False
    """Sample every class equally often; rows of a rare class are repeated."""
