"""Compiled HLO text -> what a step does: FLOPs, bytes, collectives, with loops evaluated. Of one device."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one group of devices, summed over a step; of one device."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all, collective-permute."""
    bytes: float
    """What a device sends and receives of it, one way."""
    axis: str
    """The mesh axis it runs over ("data,fsdp" for several; "?" where it is none)."""
    count: float
    """How often it runs."""
    overlapped: float
    """Of these, how many are started and awaited apart, with computation in between."""
    payload: float = 0.0
    """Bytes of the whole arrays, the larger of what goes in and what comes out."""


@dataclass(frozen=True)
class Counts:
    """A compiled step, of one device."""

    flops: float
    """Of matrix products and convolutions; kernels are apart."""
    bytes: float
    """Read and written in HBM by all operations."""
    collectives: list[Collective] = field(default_factory=list)
    flops_by_type: dict[str, float] = field(default_factory=dict)
    """The same by type of the operands: bfloat16, int8, …"""
    kernels: dict[str, float] = field(default_factory=dict)
    """How often each custom kernel (splash attention) runs, by name."""
    kernel_flops: float = 0.0
    """Of the attention kernels, by arithmetic on their shapes: the compiler does not say."""


def count(hlo_text: str, mesh_axes: dict[str, int]) -> Counts:
    """Counts a compiled module; `mesh_axes` has the mesh's axes and sizes in order, which collectives run over."""
    raise NotImplementedError
