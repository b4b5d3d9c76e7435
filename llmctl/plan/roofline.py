"""Step time from a stated roofline: no operation runs faster than its chip's peak, its memory or its links allow.

    seconds = max(compute, HBM, collectives that overlap) + collectives that do not

Matrix products run at the peak of their operands' type; everything is read and written at the full bandwidth of HBM;
collectives over an axis run on the links of the torus dimensions that the axis spans, both ways around a ring where
there is one; of those that leave a slice the data center's network carries what the devices of a slice do not have
from one another, shared out among them. Real steps are slower: this is a bound, and so is the utilization it gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmctl.plan.hlo.counts import SLICES, Collective, Counts
from llmctl.plan.topologies import Topology


@dataclass(frozen=True)
class Roofline:
    """A step's time and what bounds it. Seconds."""

    compute: float
    hbm: float
    ici: float
    """All collectives inside a slice, overlapped or not."""
    dcn: float
    """All collectives between slices."""
    exposed: float
    """Collectives that nothing hides."""

    @property
    def seconds(self) -> float:
        """The step."""
        return max(self.compute, self.hbm, self.ici + self.dcn - self.exposed) + self.exposed

    @property
    def binds(self) -> str:
        """What takes longest: compute, hbm, ici or dcn."""
        times = {"compute": self.compute, "hbm": self.hbm, "ici": self.ici, "dcn": self.dcn}
        return max(times, key=lambda name: times[name])

    def mfu(self, model_flops: float, topology: Topology, dtype: str) -> float:
        """The share of the peak that the model's own operations (of the whole step, all devices) reach at best.

        arXiv:2204.02311, appendix B.
        """
        return model_flops / (self.seconds * topology.devices * topology.chip.peak(dtype))

    def chip_hours(self, tokens: float, tokens_a_step: float, topology: Topology) -> float:
        """Chips times hours for so many tokens."""
        return self.seconds * math.ceil(tokens / tokens_a_step) * topology.chips / 3600


def of(counts: Counts, topology: Topology, mesh: Mapping[str, int], attention: str = "bfloat16") -> Roofline | None:
    """The roofline of a step (compiled or modelled), or None for chips whose speed nobody knows (CPUs).

    Args:
      counts: of one device.
      topology: where it runs.
      mesh: axes and sizes in order, the last axis over neighbouring devices.
      attention: type of the operands of attention kernels.
    """
    chip = topology.chip
    if not chip.flops:
        return None
    compute = sum(flops / chip.peak(dtype) for dtype, flops in counts.flops_by_type.items())
    compute += counts.kernel_flops / chip.peak(attention)
    ici = dcn = exposed = 0.0
    told = any(c.axis == SLICES for c in counts.collectives)  # a TPU's compiler has taken apart what leaves a slice
    for c in counts.collectives:
        here, away = (c.bytes, 0.0) if told and c.axis != SLICES else sent(c, topology, mesh)
        inside = here / bandwidth(c.axis, topology, mesh)
        outside = away / chip.dcn_bandwidth if away else 0.0
        ici, dcn = ici + inside, dcn + outside
        exposed += (inside + outside) * (1 - c.hidden / c.bytes) if c.bytes else 0.0
    return Roofline(compute, counts.bytes / chip.hbm_bandwidth, ici, dcn, exposed)


def _strides(mesh: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Axis -> (devices between neighbours, size)."""
    found, stride = {}, 1
    for axis, size in reversed(list(mesh.items())):
        found[axis] = (stride, size)
        stride *= size
    return found


def group(axis: str, topology: Topology, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Of a group of devices along `axis`: (those in one slice, slices)."""
    inside = topology.devices // topology.slices
    strides = _strides(mesh)
    names = [a for a in axis.split(",") if a in strides]
    if not names:
        return 1, topology.slices
    here = {a: min(size, max(1, inside // stride)) for a, (stride, size) in strides.items()}
    return math.prod(here[a] for a in names), math.prod(strides[a][1] // here[a] for a in names)


def sent(c: Collective, topology: Topology, mesh: Mapping[str, int]) -> tuple[float, float]:
    """Bytes that a device sends inside its slice, and to other slices.

    Devices of a slice sum or gather among themselves, so that each needs to send its share of the slice's alone.
    """
    here, slices = group(c.axis, topology, mesh)
    devices = here * slices
    if slices == 1:
        return c.bytes, 0.0
    if here == 1 or c.kind == "collective-permute":  # the slowest of its ways is to another slice
        return 0.0, c.bytes
    if c.kind == "all-to-all":
        return c.bytes * (here - 1) / (devices - 1), c.bytes * (devices - here) / (devices - 1)
    whole = c.bytes * devices / (devices - 1)
    return whole * (here - 1) / here, whole * (slices - 1) / devices


def bandwidth(axis: str, topology: Topology, mesh: Mapping[str, int]) -> float:
    """Bytes a second that leave a device along a mesh axis, inside a slice.

    Devices are numbered along the torus, its last dimension slowest, so a mesh axis spans whole dimensions or parts of
    them: two links a dimension where it goes all the way around a ring, one where it is a line, of which the longest
    way bounds a collective.
    """
    chip = topology.chip
    if not chip.dimensions:  # a switch
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
