"""Compute a lower bound of the step time from peak FLOPs, HBM bandwidth and network bandwidth (roofline model).

    seconds = max(compute, HBM, overlapped collectives) + other collectives

- Matrix products run at the peak rate of their operand dtype.
- All data is read and written at the full bandwidth of HBM.
- Collectives over an axis use the links of the torus dimensions that the axis spans. In a ring, links in both
  directions are used.
- Devices of a slice first exchange data among themselves. Only data for other slices crosses the data-center
  network. Each device of a slice sends an equal part of this data.

Real steps are slower. The time is therefore a lower bound, and the utilization an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmctl.plan.hlo.counts import SLICES, Collective, Counts
from llmctl.plan.topologies import Topology


@dataclass(frozen=True)
class Roofline:
    """Store the times of one step by resource, in seconds."""

    compute: float
    hbm: float
    ici: float
    """Time of all collectives inside a slice (interconnect), including collectives that overlap with computation."""
    dcn: float
    """Time of all collectives between slices (data-center network), including collectives that overlap with
    computation."""
    exposed: float
    """Time of the collectives that do not overlap with computation."""

    @property
    def seconds(self) -> float:
        """Return the time of the step in seconds."""
        return max(self.compute, self.hbm, self.ici + self.dcn - self.exposed) + self.exposed

    @property
    def binds(self) -> str:
        """Return the resource whose time is the longest: compute, hbm, ici or dcn."""
        times = {"compute": self.compute, "hbm": self.hbm, "ici": self.ici, "dcn": self.dcn}
        return max(times, key=lambda name: times[name])

    def mfu(self, model_flops: float, topology: Topology, dtype: str) -> float:
        """Return the upper bound of the model FLOPs utilization (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).

        Args:
          model_flops: FLOPs of the model per step, over all devices.
          topology: hardware of the step.
          dtype: operand dtype whose peak is the reference.
        """
        return model_flops / (self.seconds * topology.devices * topology.chip.peak(dtype))

    def chip_hours(self, tokens: float, tokens_per_step: float, topology: Topology) -> float:
        """Return the number of chip-hours that training on `tokens` tokens takes."""
        return self.seconds * math.ceil(tokens / tokens_per_step) * topology.chips / 3600


def of(counts: Counts, topology: Topology, mesh: Mapping[str, int], attention: str = "bfloat16") -> Roofline | None:
    """Compute the roofline of a compiled or modelled step.

    Args:
      counts: counts of one device.
      topology: hardware of the step.
      mesh: axes of the mesh and their sizes, in order. Neighbouring devices differ in the last axis.
      attention: operand dtype of the attention kernels.

    Returns:
      The roofline, or None for chips without known peak FLOPs (CPUs).
    """
    chip = topology.chip
    if not chip.flops:
        return None
    compute = sum(flops / chip.peak(dtype) for dtype, flops in counts.flops_by_type.items())
    compute += counts.kernel_flops / chip.peak(attention)
    ici = dcn = exposed = 0.0
    told = any(c.axis == SLICES for c in counts.collectives)  # the TPU compiler lists DCN traffic separately
    for c in counts.collectives:
        here, away = (c.bytes, 0.0) if told and c.axis != SLICES else sent(c, topology, mesh)
        inside = here / bandwidth(c.axis, topology, mesh)
        outside = away / chip.dcn_bandwidth if away else 0.0
        ici, dcn = ici + inside, dcn + outside
        exposed += (inside + outside) * (1 - c.hidden / c.bytes) if c.bytes else 0.0
    return Roofline(compute, counts.bytes / chip.hbm_bandwidth, ici, dcn, exposed)


def _strides(mesh: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return {mesh axis: (difference between the device numbers of neighbors, size of the axis)}."""
    found, stride = {}, 1
    for axis, size in reversed(list(mesh.items())):
        found[axis] = (stride, size)
        stride *= size
    return found


def group(axis: str, topology: Topology, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Return the number of devices that take part in a collective along `axis`, as (devices per slice, slices)."""
    inside = topology.devices // topology.slices
    strides = _strides(mesh)
    names = [a for a in axis.split(",") if a in strides]
    if not names:
        return 1, topology.slices
    here = {a: min(size, max(1, inside // stride)) for a, (stride, size) in strides.items()}
    return math.prod(here[a] for a in names), math.prod(strides[a][1] // here[a] for a in names)


def sent(c: Collective, topology: Topology, mesh: Mapping[str, int]) -> tuple[float, float]:
    """Return the bytes that a device sends in a collective, as (bytes within its slice, bytes to other slices).

    The devices of a slice first reduce or gather among themselves. Each device then sends only its share of the slice's
    data.
    """
    here, slices = group(c.axis, topology, mesh)
    devices = here * slices
    if slices == 1:
        return c.bytes, 0.0
    if here == 1 or c.kind == "collective-permute":  # for a permutation, the path to another slice is the slowest
        return 0.0, c.bytes
    if c.kind == "all-to-all":
        return c.bytes * (here - 1) / (devices - 1), c.bytes * (devices - here) / (devices - 1)
    whole = c.bytes * devices / (devices - 1)
    return whole * (here - 1) / here, whole * (slices - 1) / devices


def bandwidth(axis: str, topology: Topology, mesh: Mapping[str, int]) -> float:
    """Return the bytes per second that a device can send along a mesh axis inside its slice.

    Devices are numbered along the torus: neighboring numbers are neighbors along its first dimension. A mesh axis
    therefore spans complete dimensions or parts of dimensions. A dimension that the axis covers as a full ring
    contributes two links. A dimension that the axis covers as a line contributes one link, because the longest path
    bounds a collective.
    """
    chip = topology.chip
    if not chip.dimensions:  # switched network
        return chip.ici_bandwidth
    link = chip.ici_bandwidth / (2 * chip.dimensions)
    strides = _strides(mesh)
    links = 0
    for name in (a for a in axis.split(",") if a in strides):
        stride, size = strides[name]
        below = chip.devices
        for n, ring in zip(topology.shape, topology.wrap, strict=True):
            covered = min(stride * size, below * n) > max(stride, below)
            whole = stride <= below and stride * size >= below * n
            if n > 1 and covered:
                links += 2 if ring and whole else 1
            below *= n
    return link * min(max(links, 1), 2 * chip.dimensions)
