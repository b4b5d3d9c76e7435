"""Define the settings of pruning: the method, and how it sets single weights to zero.

The module does not import JAX.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from llmctl.compress.calibration.settings import DAMPING, CalibrationConfig
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.scores import SCORES
from llmctl.compress.pruning.sparse_method import SPARSEGPT, Allocation, AllocationName, SparseMethod, comparable
from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.config.registry import Choices

STRUCTURED = "structured"
"""Name of the method that removes heads, neurons, hidden channels and layers. Every other method sets single weights to
zero."""


def _method(name: str) -> str:
    known = _methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}{hint(name, known)}; known: {', '.join(known)}")
    return name


def _methods() -> list[str]:
    return [STRUCTURED, SPARSEGPT, *SCORES]


class MethodSettings(CalibrationConfig):
    """Set the pruning method and its calibration data."""

    added: ClassVar[frozenset[str]] = frozenset({"repair"})

    method: Annotated[str, AfterValidator(_method), Choices(_methods)] = STRUCTURED
    """Pruning method. structured: remove heads, neurons, hidden channels and layers. All other methods set single
    weights to zero. sparsegpt: choose zeros by the Hessian, and change the kept weights to compensate. The following
    methods set the weights with the lowest scores to zero, and change kept weights only if repair is set. magnitude:
    |w|. wanda: |w| times the norm of the input. ria: (|w| / sum of |w| in the row + |w| / sum of |w| in the column)
    times the square root of the input's norm. taylor, fisher: scores from the loss's gradient. random: random
    scores."""
    repair: bool = False
    """Recompute the kept weights after pruning, by least squares on the calibration data. The outputs of the layers
    then stay close to the outputs before pruning."""


class SparseSettings(MethodSettings):
    """Set how a pruning method sets single weights to zero.

    >>> SparseSettings(method="wanda", pattern="2:4").zeros.pattern.sparsity
    0.5
    """

    added: ClassVar[frozenset[str]] = MethodSettings.added | {"damping", "allocation", "spread", "outlier", "store"}

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of each matrix to set to zero, if the method prunes single weights. If the method is `wanda`, the
    fraction applies to the inputs of each output. If the allocation is not uniform, the fraction applies to all
    matrices together."""
    pattern: str = "unstructured"
    """Pattern of the zeros, if the method prunes single weights. unstructured: zeros at any position. N:M, such as 2:4:
    keep N of every M inputs; N and M determine the sparsity. AxB, such as 128x1: prune the blocks of A inputs and B
    outputs with the lowest sums of scores."""
    damping: float = Field(default=DAMPING, gt=0, le=1)
    """Fraction of the Hessian's mean diagonal entry to add to the diagonal, if the method is `sparsegpt`. If a Hessian
    has no inverse, the fraction is multiplied by 10, and the matrix is reported."""

    allocation: AllocationName = "uniform"
    """Distribution of the sparsity over the layers, if the method prunes single weights and the pattern is not N:M.
    uniform: equal in all layers. owl: lower for layers with more outliers. sensitivity: lower for layers whose pruning
    changes the final hidden states more. global: the lowest scores of the complete model are pruned. owl, sensitivity
    and global set exactly the fraction `sparsity` of the model to zero."""
    spread: float = Field(default=0.08, gt=0, lt=0.5)
    """Differences of sparsity between layers, if the allocation is `owl` or `sensitivity`. owl: half the difference
    between the highest and the lowest sparsity among the layers. sensitivity: largest difference between a layer's
    sparsity and the model's sparsity."""
    outlier: float = Field(default=5.0, gt=0)
    """Threshold for the scores of outliers, if the allocation is `owl`: a multiple of the layer's mean score. The
    scores are those of the method `wanda`."""
    store: Literal["dense", "sparse"] = "dense"
    """Format of the pruned matrices on disk, also in later stages, if the method prunes single weights. sparse: store
    only nonzero weights and their positions. In memory, matrices are dense."""

    @property
    def zeros(self) -> SparseMethod:
        """Return the configured method of unstructured pruning, which sets single weights to zero."""
        allocation = Allocation(self.allocation, self.spread, self.outlier)
        pattern = Pattern.parse(self.pattern, self.sparsity)
        return SparseMethod(self.method, pattern, self.damping, self.repair, allocation)

    def check_zeros(self) -> None:
        """Check that sparsity, pattern and allocation fit one another.

        Raises:
          ValueError: If the settings do not fit one another.
        """
        try:
            own = Pattern.parse(self.pattern, self.sparsity).sparsity
        except RequestError as e:
            raise ValueError(str(e)) from None
        if "sparsity" in self.model_fields_set and abs(self.sparsity - own) > 1e-9:
            raise ValueError(f"sparsity {self.sparsity} contradicts pattern {self.pattern}, which has {own:g}")
        self._check_allocation(own)

    def _check_allocation(self, sparsity: float) -> None:
        """Raise a ValueError if the allocation does not fit the other settings."""
        none, both = set[str](), {"outlier", "spread"}
        stray = {"uniform": both, "global": both, "sensitivity": {"outlier"}, "owl": none}[self.allocation]
        if stray := sorted(self.model_fields_set & stray):
            instead = "'owl'" if "outlier" in stray else "'owl' or 'sensitivity'"
            raise ValueError(f"{', '.join(stray)}: not for allocation {self.allocation!r}; set allocation to {instead}")
        if self.allocation == "uniform":
            return
        pattern = Pattern.parse(self.pattern, self.sparsity)
        if pattern.of:
            raise ValueError(
                f"allocation {self.allocation!r} is for unstructured pruning; pattern {self.pattern} has one sparsity"
            )
        if self.allocation == "global":
            if self.method not in (known := comparable()):
                raise ValueError(
                    f"allocation 'global' compares the scores of all matrices, and those of {self.method!r} are "
                    f"comparable within a matrix only; set method to one of {', '.join(known)}"
                )
            return
        if pattern.blocks:
            raise ValueError(
                f"allocation {self.allocation!r} is for unstructured pruning; with pattern {self.pattern}, set "
                "allocation to 'uniform' or 'global'"
            )
        room = min(sparsity, 1 - sparsity)
        if self.allocation == "owl":
            room /= 2  # a layer can differ from the mean by nearly 2 * spread, if all others are at the other end
        if self.spread >= room:
            raise ValueError(f"spread {self.spread:g} is too large for sparsity {sparsity:g}; say less than {room:g}")
