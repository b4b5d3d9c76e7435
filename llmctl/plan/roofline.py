"""Step time from a stated roofline: no operation runs faster than its chip's peak, its memory or its links allow.

    seconds = max(compute, HBM, collectives that overlap) + collectives that do not

Matrix products run at the peak of their operands' type; everything is read and written at the full bandwidth of HBM;
collectives over an axis run on the links of the torus dimensions that the axis spans, both ways around a ring where
there is one; axes that leave a slice run on the data center's network. Real steps are slower: this is a bound, and the
utilization that it gives is one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmctl.plan.hlo import Counts
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
    for c in counts.collectives:
        outside = crosses(c.axis, topology, mesh)
        rate = chip.dcn_bandwidth if outside else bandwidth(c.axis, topology, mesh)
        seconds = c.bytes / rate
        ici, dcn = (ici, dcn + seconds) if outside else (ici + seconds, dcn)
        exposed += seconds * (1 - c.hidden / c.bytes) if c.bytes else 0.0
    return Roofline(compute, counts.bytes / chip.hbm_bandwidth, ici, dcn, exposed)


def _strides(mesh: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Axis -> (devices between neighbours, size)."""
    found, stride = {}, 1
    for axis, size in reversed(list(mesh.items())):
        found[axis] = (stride, size)
        stride *= size
    return found


def crosses(axis: str, topology: Topology, mesh: Mapping[str, int]) -> bool:
    """Whether some device of a group along `axis` lies in another slice."""
    inside = topology.devices // topology.slices
    strides = _strides(mesh)
    names = [a for a in axis.split(",") if a in strides]
    reach = max((strides[a][0] * strides[a][1] for a in names), default=topology.devices)
    return topology.slices > 1 and reach > inside


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
