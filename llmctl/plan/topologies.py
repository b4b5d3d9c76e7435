"""Define hardware topologies by name: TPU slices, GPU nodes and CPU devices, with their networks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.distributed import hardware
from llmctl.distributed.hardware import Chip

__all__ = ["Chip", "Topology", "find", "known", "smallest_first"]

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SHAPES = {
    "v4": CUBES,
    "v5e": FLAT,
    "v5p": (*CUBES, "16x16x24"),
    "v6e": FLAT,
    "tpu7x": (*CUBES, "16x16x24"),
}
"""Shapes of the slices that can be rented, by TPU chip (docs.cloud.google.com/tpu/docs)."""
GPUS = ("a100", "h100", "h200")
NODE = 8
"""Number of GPUs that share an NVLink switch (a node). More GPUs form several nodes, which a network connects."""
MOST = {"tpu": 2**15, "cuda": 2**12, "cpu": 2**12}
"""Maximum number of devices in a plan, by platform. The number is limited because JAX creates an object for each
device.
"""


@dataclass(frozen=True)
class Topology:
    """Describe chips that are used together, and the shape of their network.

    Example:
        >>> topology = find("2*v5e:4x4")
        >>> topology.chips, topology.shape, topology.slices
        (32, (4, 4), 2)
    """

    name: str
    """Name of the topology, such as v5e:4x4, 2*v5p:4x4x4, h100:8 or cpu:8."""
    platform: str
    """Platform of the chips: tpu, cuda or cpu."""
    chip: Chip
    shape: tuple[int, ...]
    """Number of chips along each axis of a slice; for GPUs, the number of GPUs per node."""
    slices: int = 1
    """Number of slices (nodes) that the data-center network connects."""

    @property
    def chips(self) -> int:
        """Return the number of chips in all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Return the number of JAX devices. The product of the mesh axes must equal this number."""
        return self.chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Return, for each axis of a slice, whether the axis is a ring.

        On 2D chips, an axis of 16 chips is a ring. On 3D chips, all axes are rings if every size is a multiple of 4.
        """
        if self.chip.dimensions == 2:
            return tuple(n == 16 for n in self.shape)
        return tuple(all(m % 4 == 0 for m in self.shape) for _ in self.shape)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments that describe a TPU topology for `jax.experimental.topologies.get_topology_desc`."""
        found: dict[str, Any] = {
            "platform": "tpu",
            "topology_name": f"{self.chip.name}:{'x'.join(map(str, self.shape))}",
            "chips_per_host_bounds": (1, 1, 1) if math.prod(self.shape) == 1 else (2, 2, 1),
        }
        if any(self.wrap):
            found["wrap"] = (*self.wrap, *[False] * (3 - len(self.shape)))
        if self.chip.name == "v4":  # the two cores of a v4 chip form one device
            found["chip_config_name"] = "megacore"
        if self.slices > 1:
            found["num_slices"] = self.slices
        return found


def known() -> list[str]:
    """Return the names of all topologies with one slice. N stands for any number of GPUs or CPU devices."""
    slices = [f"{chip}:{shape}" for chip, shapes in SHAPES.items() for shape in shapes]
    return [*slices, *(f"{gpu}:N" for gpu in GPUS), "cpu:N"]


def find(name: str) -> Topology:
    """Return the topology with this name: CHIP:SHAPE, SLICES*CHIP:SHAPE, or CHIP:NUMBER for GPUs and CPU devices.

    Raises:
      RequestError: If the name is unknown.
    """
    parts = re.fullmatch(r"(?:(\d+)\*)?([\w-]+):([\dx]+)", name.strip().lower())
    slices, chip, shape = int(parts[1] or 1) if parts else 1, parts[2] if parts else "", parts[3] if parts else ""
    if slices and shape in SHAPES.get(chip, ()):
        full = f"{slices}*{chip}:{shape}" if slices > 1 else f"{chip}:{shape}"
        return _bounded(Topology(full, "tpu", hardware.chip(chip), tuple(map(int, shape.split("x"))), slices))
    if chip in (*GPUS, "cpu") and slices == 1 and shape.isdigit() and int(shape):
        return _bounded(_counted(chip, int(shape)))
    near = hint(f"{chip}:{shape}" if parts else name, known()) if chip not in (*GPUS, "cpu") else ""
    raise RequestError(f"topology: unknown {name!r}{near}; known: {_summary()}")


def _counted(chip: str, number: int) -> Topology:
    """Return a topology of `number` GPUs or CPU devices."""
    if chip == "cpu":
        return Topology(f"cpu:{number}", "cpu", hardware.CPU, (number,))
    if number > NODE and number % NODE:
        raise RequestError(f"topology: {chip}:{number}: more than {NODE} GPUs are whole nodes of {NODE}")
    nodes = max(1, number // NODE)
    return Topology(f"{chip}:{number}", "cuda", hardware.chip(chip), (number // nodes,), nodes)


def _bounded(found: Topology) -> Topology:
    if found.devices > MOST[found.platform]:
        raise RequestError(f"topology: {found.name} are {found.devices:,} devices; at most {MOST[found.platform]:,}")
    return found


def _summary() -> str:
    rows = [f"{chip}:{{{','.join(shapes)}}}" for chip, shapes in SHAPES.items()]
    return f"{' '.join(rows)}, any of these as SLICES*CHIP:SHAPE, {' '.join(f'{gpu}:N' for gpu in GPUS)}, cpu:N"


def smallest_first(chip: str) -> list[Topology]:
    """Return the topologies of a chip, smallest first: all single slices of a TPU, or 1 to 256 GPUs.

    Raises:
      RequestError: If the chip is unknown.
    """
    if chip in SHAPES:
        return sorted((find(f"{chip}:{shape}") for shape in SHAPES[chip]), key=lambda t: t.chips)
    if chip in GPUS:
        return [find(f"{chip}:{n}") for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    raise RequestError(f"unknown chip {chip!r}{hint(chip, [*SHAPES, *GPUS])}; known: {', '.join([*SHAPES, *GPUS])}")


def with_chips(chip: str, number: int) -> Topology:
    """Return the topology with exactly `number` chips of the type `chip`.

    Raises:
      RequestError: If no slice has this number of chips. The message lists the existing numbers.
    """
    found = smallest_first(chip)
    if chip in GPUS:  # any number of complete nodes
        return find(f"{chip}:{number}")
    if match := next((t for t in found if t.chips == number), None):
        return match
    raise RequestError(f"chips: no {chip} slice has {number} chips; there are {', '.join(str(t.chips) for t in found)}")
