"""Describe how structured pruning selects the parts to remove, and whether it repairs matrices whose inputs were
removed.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImportanceName = Literal["contribution", "activation", "taylor", "magnitude", "random"]


@dataclass(frozen=True)
class StructuredMethod:
    """Describe a method that removes heads, neurons and hidden channels.

    >>> StructuredMethod("taylor").gradients, StructuredMethod("activation", repair=True).gradients
    (True, False)
    """

    importance: ImportanceName = "contribution"
    """Importance of a head, neuron or channel; the parts with the lowest importance are removed
    (`llmctl.compress.structured_pruning.importance`)."""
    repair: bool = False
    """Whether matrices whose inputs were removed are repaired: recomputed by least squares on the calibration data."""
    seed: int = 0
    """Seed of random importance."""

    @property
    def gradients(self) -> bool:
        """Return whether the importance needs gradients of the loss."""
        return self.importance == "taylor"
