"""Topologies by name: which chips are rented together, and how they are joined."""

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
"""Slices that are rented (docs.cloud.google.com/tpu/docs)."""
GPUS = ("a100", "h100", "h200")
NODE = 8
"""GPUs that share an NVLink switch; more are nodes on a network."""
MOST = {"tpu": 2**15, "cuda": 2**12, "cpu": 2**12}
"""Devices that a plan can be for, by platform: JAX makes an object of each."""


@dataclass(frozen=True)
class Topology:
    """Chips that are rented together."""

    name: str
    """As people write it: v5e:4x4, 2*v5p:4x4x4, h100:8, cpu:8."""
    platform: str
    """tpu, cuda or cpu."""
    chip: Chip
    shape: tuple[int, ...]
    """Chips of a slice (GPUs of a node) along each axis."""
    slices: int = 1
    """Slices (nodes) joined by the data center's network."""

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """As JAX counts them: what the mesh's axes multiply to."""
        return self.chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes of a slice are rings: 16 chips of the flat ones, 4 and its multiples of those made of cubes."""
        if self.chip.dimensions == 2:
            return tuple(n == 16 for n in self.shape)
        return tuple(all(m % 4 == 0 for m in self.shape) for _ in self.shape)

    @property
    def arguments(self) -> dict[str, Any]:
        """For `jax.experimental.topologies.get_topology_desc`, TPUs alone."""
        found: dict[str, Any] = {
            "platform": "tpu",
            "topology_name": f"{self.chip.name}:{'x'.join(map(str, self.shape))}",
            "chips_per_host_bounds": (1, 1, 1) if math.prod(self.shape) == 1 else (2, 2, 1),
        }
        if any(self.wrap):
            found["wrap"] = (*self.wrap, *[False] * (3 - len(self.shape)))
        if self.chip.name == "v4":  # its two cores are one device
            found["chip_config_name"] = "megacore"
        if self.slices > 1:
            found["num_slices"] = self.slices
        return found


def known() -> list[str]:
    """Every name of one slice, with N where any number goes."""
    slices = [f"{chip}:{shape}" for chip, shapes in SHAPES.items() for shape in shapes]
    return [*slices, *(f"{gpu}:N" for gpu in GPUS), "cpu:N"]


def find(name: str) -> Topology:
    """The topology that people call `name`: CHIP:SHAPE, SLICES*CHIP:SHAPE, or a number of GPUs or CPU devices.

    Raises RequestError for one that is not known.
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
    """GPUs or CPU devices by number."""
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
    """Every topology of a chip (one slice, one node), the fewest chips first; for `--fit` and `--chips`.

    Raises RequestError for a chip that is not known.
    """
    if chip in SHAPES:
        return sorted((find(f"{chip}:{shape}") for shape in SHAPES[chip]), key=lambda t: t.chips)
    if chip in GPUS:
        return [find(f"{chip}:{n}") for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    raise RequestError(f"unknown chip {chip!r}{hint(chip, [*SHAPES, *GPUS])}; known: {', '.join([*SHAPES, *GPUS])}")


def with_chips(chip: str, number: int) -> Topology:
    """The slice of exactly `number` chips; raises RequestError, naming the sizes there are."""
    found = smallest_first(chip)
    if chip in GPUS:  # any number, to whole nodes
        return find(f"{chip}:{number}")
    if match := next((t for t in found if t.chips == number), None):
        return match
    raise RequestError(f"chips: no {chip} slice has {number} chips; there are {', '.join(str(t.chips) for t in found)}")
