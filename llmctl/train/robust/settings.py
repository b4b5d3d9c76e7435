"""Define the settings of robust finetuning. Each class is a section of the config of `llmctl finetune`."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmctl.config.base import Config as Settings
from llmctl.config.base import format_toml
from llmctl.train.robust.registry import ADVERSARIES

Positive = Annotated[float, Field(gt=0)]
Norm = Literal["", "l2", "linf"]


def _known(name: str) -> str:
    return name and ADVERSARIES.check(name)


def _weights(value: Any) -> Any:
    """Return "balanced", or the class weights as a dictionary of floats.

    Raises:
      ValueError: If the value is neither "balanced" nor a table of positive numbers.
    """
    if value == "balanced":
        return value
    numbers = isinstance(value, dict) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in value.values()
    )
    if not numbers:
        raise ValueError(f'must be "balanced" or a table of numbers above 0 by class, got {format_toml(value)}')
    return {name: float(v) for name, v in value.items()}


class AdversarialConfig(Settings):
    """Set adversarial training, which perturbs the token embeddings of each row so that the loss increases.

    Norms and step sizes are relative to the size of the row's embeddings. For l2, the size is the Euclidean norm. For
    linf, the size is the root mean square of the entries.
    """

    common: ClassVar[tuple[str, ...] | None] = ()

    method: Annotated[str, AfterValidator(_known), ADVERSARIES] = ""
    """Adversarial method. fgm: train on clean rows, and on rows perturbed by one step along the gradient. pgd: train on
    rows perturbed by several steps. freelb: train on the mean loss over the steps, at the cost of one pass per step.
    smart: train on clean rows, and keep outputs similar under perturbation and from step to step. Default: none."""
    epsilon: Positive | None = None
    """Maximum norm of a row's perturbation. Default: 0.02."""
    norm: Norm = ""
    """Norm of a row's perturbation. l2: Euclidean norm of all entries. linf: largest absolute value of an entry.
    Default: linf for the method `smart`, l2 for the other methods."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Number of steps in the search for a perturbation, for the methods `pgd`, `freelb` and `smart`. Default: 1 for
    smart, 3 for pgd and freelb."""
    step_size: Positive | None = None
    """Norm of each step of the search, for the methods `pgd`, `freelb` and `smart`. Default: 0.02 for smart, 0.01 for
    pgd and freelb."""
    start: Annotated[float, Field(ge=0)] | None = None
    """Maximum norm of the random perturbation before the first step, for the methods `pgd`, `freelb` and `smart`.
    Default: 0.02 for pgd, 0.01 for freelb and 0.001 for smart, but at most epsilon."""
    weight: Positive | None = None
    """Weight of perturbed rows in the loss. fgm and pgd: fraction of the loss that comes from perturbed rows. The rest
    comes from clean rows. smart: factor of the divergence between the outputs of clean and perturbed rows. Default: 0.5
    for fgm, 1 for pgd, 2 for smart."""
    proximal: Annotated[float, Field(ge=0)] | None = None
    """Factor of the divergence between outputs of the current weights and outputs of the averaged weights, for the
    method `smart`. Default: 2.
    """
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the moving average of the weights, for the method `smart`. In the first tenth of the steps, the decay is
    at most 0.99. Default: 0.999."""

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
    """Set the regularization of finetuning, and the weights of classes."""

    common: ClassVar[tuple[str, ...] | None] = ()
    added: ClassVar[frozenset[str]] = frozenset({"mixout"})

    r_drop: float = Field(default=0.0, ge=0)
    """Factor of the divergence between the outputs of two passes with different dropout (R-Drop). 0 disables R-Drop."""
    neftune: float = Field(default=0.0, ge=0)
    """Alpha of NEFTune: uniform noise of at most alpha / sqrt(tokens * model width) is added to each entry of the token
    embeddings. 5 is usual. 0 adds no noise.
    """
    l2_start: float = Field(default=0.0, ge=0)
    """Factor of half the squared distance between the weights and the weights before finetuning (L2-SP). The task's
    head is excluded. Set optim.weight_decay = 0 too, because weight decay pulls the weights to zero. 0 disables L2-SP.
    """
    mixout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which a training step replaces a weight by its value before finetuning (Mixout). The task's head
    is excluded. 0.1 to 0.9 are usual, in place of dropout. The finetuning method must train the weights of the model. 0
    disables Mixout."""
    class_weights: Annotated[Any, AfterValidator(_weights)] = {}
    """Weight of each class in the loss, as a table such as {"rare" = 5.0}. Classes that the table does not contain have
    weight 1. balanced: weights inversely proportional to the number of training examples of the class."""
    balance: bool = False
    """Sample every class equally often. Examples of rare classes are repeated."""
