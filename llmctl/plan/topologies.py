"""Topologies by name: chips, their memory and their speeds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them, by its maker's data sheet."""

    name: str
    hbm_bytes: int
    flops: dict[str, float]
    """FLOP/s by type of the operands (bfloat16, float32, int8, …), without sparsity."""
    hbm_bandwidth: float
    """Bytes a second."""
    ici_bandwidth: float
    """Bytes a second that leave a chip for its neighbours, over all links."""
    dcn_bandwidth: float = 0.0
    """Bytes a second that leave a chip for another slice."""


@dataclass(frozen=True)
class Topology:
    """Chips that are rented together."""

    name: str
    """As people write it: v5e:4x4, 2*v5p:4x4x4, h100:8, cpu:8."""
    platform: str
    """tpu, cuda or cpu."""
    chip: Chip
    shape: tuple[int, ...]
    """Chips of a slice along each axis."""
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        total = self.slices
        for n in self.shape:
            total *= n
        return total
