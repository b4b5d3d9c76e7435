"""Memory of a step from config and mesh alone: no compiler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: float
    optimizer: float
    temporaries: float
    """Gradients, activations and what lives between operations."""
    batch: float
    cache: float
    """Keys and values, or calibration statistics."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.optimizer + self.temporaries + self.batch + self.cache
