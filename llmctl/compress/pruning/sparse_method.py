"""Describe how single weights are pruned: by a score or by SparseGPT, in a sparsity pattern, with or without repair.

Repair recomputes the kept weights after pruning. The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmctl.compress.calibration.settings import DAMPING
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.scores import SCORES, Score

SPARSEGPT = "sparsegpt"
"""Name of SparseGPT, which chooses the zeros and changes the kept weights together
(`llmctl.compress.pruning.sparsegpt`)."""


AllocationName = Literal["uniform", "owl", "sensitivity", "global"]


@dataclass(frozen=True)
class Allocation:
    """Describe how zeros are distributed over layers (`llmctl.compress.pruning.allocation` and `global_threshold`).

    The name is "uniform", "owl", "sensitivity" or "global". With "global", the weights of all matrices compete.
    """

    name: AllocationName = "uniform"
    spread: float = 0.08
    """Differences of sparsity between layers. "owl": half the difference between the highest and the lowest sparsity
    among the layers (OWL's lambda). "sensitivity": largest difference between a layer's sparsity and the model's
    sparsity."""
    outlier: float = 5.0
    """Threshold for the scores of outliers, as a multiple of the layer's mean score (OWL's M)."""

    @property
    def uniform(self) -> bool:
        """Return whether all layers have the same sparsity."""
        return self.name == "uniform"

    @property
    def calibrated(self) -> bool:
        """Return whether the allocation reads calibration data."""
        return self.name in ("owl", "sensitivity")


def comparable() -> list[str]:
    """Return the names of the scores that are comparable between matrices, which the allocation "global" needs.

    Scores that read the inputs of a matrix are not comparable, because each matrix has other inputs.
    """
    return [name for name in SCORES if (score := SCORES[name]).per == "matrix" and not score.statistics]


@dataclass(frozen=True)
class SparseMethod:
    """Describe a method that sets single weights to zero.

    >>> SparseMethod("wanda", Pattern.parse("2:4", 0.5)).hessian, SparseMethod("sparsegpt", Pattern(0.5)).hessian
    (False, True)
    """

    name: str
    """Name of a score in `SCORES`, or SPARSEGPT."""
    pattern: Pattern
    damping: float = DAMPING
    """Damping of SparseGPT's Hessian, as a fraction of the mean diagonal entry."""
    repair: bool = False
    """Whether the kept weights are recomputed after pruning, to minimize the error of the outputs
    (`llmctl.compress.pruning.repair`)."""
    allocation: Allocation = Allocation()

    def score_only(self, sparsity: float) -> SparseMethod:
        """Return a method with the same score, without repair, for an unstructured pattern of the given sparsity.

        For SparseGPT, the returned method has Wanda's score.
        """
        return SparseMethod("wanda" if self.name == SPARSEGPT else self.name, Pattern(sparsity))

    @property
    def score(self) -> Score | None:
        """Return the score that selects the zeros; None for SparseGPT."""
        return None if self.name == SPARSEGPT else SCORES[self.name]

    @property
    def per(self) -> Literal["matrix", "output"]:
        """Return the group ("matrix" or "output") in which an unstructured pattern fixes the number of zeros."""
        return self.score.per if self.score else "matrix"

    @property
    def gradients(self) -> tuple[Literal["sum", "absolute", "square"], ...]:
        """Return the names of the gradient sums that the score needs."""
        return self.score.gradients if self.score else ()

    @property
    def hessian(self) -> bool:
        """Return whether the method reads Gram matrices of inputs (Hessians) to change the kept weights."""
        return self.name == SPARSEGPT or self.repair

    @property
    def moments(self) -> bool:
        """Return whether the score needs the sum of squares of each input.

        If Gram matrices are collected, their diagonals are these sums.
        """
        return bool(self.score and self.score.statistics)

    @property
    def calibrated(self) -> bool:
        """Return whether the method reads calibration data."""
        return self.hessian or self.moments or bool(self.gradients) or self.allocation.calibrated

    @property
    def title(self) -> str:
        """Return the name of the setting that changes kept weights (SparseGPT or repair), for error messages."""
        return f"method {self.name!r}" if self.name == SPARSEGPT else "repair"
