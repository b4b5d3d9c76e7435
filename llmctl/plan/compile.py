"""Compiling ahead of time for devices that are not attached: the compiler runs here, on this machine's CPU."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from llmctl.config.errors import RequestError, WorkError
from llmctl.plan.topologies import Topology
from llmctl.plan.training_programs import Program


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, of one device."""

    text: str
    """The optimized HLO; empty where it was refused for want of memory."""
    arguments: int
    """Bytes of what goes in, and stays while it runs."""
    outputs: int
    """Bytes of what comes out and does not take an argument's place."""
    temporaries: int
    """Bytes of everything between."""
    peak: int
    """Bytes in use at the worst moment."""
    wants: int
    """Bytes that a refused program asked for; 0 where it compiled."""
    seconds: float
    says: dict[str, float]
    """The compiler's own cost figures, which count loop bodies once and leave kernels out: to be shown, not used."""


def devices(topology: Topology) -> list[Any]:
    """The topology's devices, to make a mesh of."""
    import jax
    from jax.experimental import topologies

    if topology.platform != "tpu":  # CPU devices also stand for GPUs, whose programs are lowered alone
        there = jax.devices("cpu")
        if len(there) < topology.devices:
            raise RequestError(f"plan: {topology.name}: this process has {len(there)} CPU devices")
        return there[: topology.devices]
    return list(topologies.get_topology_desc(**topology.arguments).devices)


def compiled(program: Program) -> Compiled:
    """Compiles. A program that does not fit the memory of its device is a result, not an error.

    Raises WorkError where the compiler fails for another reason.
    """
    began = time.monotonic()
    try:
        found = program.trace().lower().compile()
    except RequestError:
        raise
    except Exception as e:  # XLA raises one type for everything
        wants = wanted(str(e))
        if not wants:
            raise WorkError(f"plan: {program.title} does not compile: {e}") from e
        return Compiled("", 0, 0, 0, 0, wants, time.monotonic() - began, {})
    costs = found.cost_analysis() or {}
    memory = found.memory_analysis()
    return Compiled(
        found.as_text(),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        0,
        time.monotonic() - began,
        {name.replace(" ", "_"): costs[name] for name in COSTS if name in costs},
    )


COSTS = ("flops", "bytes accessed", "optimal_seconds")
SIZE = r"([\d.]+)([KMGT]?)i?B?"
REFUSALS = (
    rf"Used {SIZE} of [\d.]+[KMGT]?i?B? hbm",
    rf"[Tt]otal memory required for HLO temporaries \({SIZE}\) exceeds available HBM",
)
"""How libtpu says that a program needs more memory than there is."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def wanted(message: str) -> int:
    """Bytes that a refused program asked for, from the compiler's own words; 0 where it was about something else."""
    for pattern in REFUSALS:
        if found := re.search(pattern, message):
            return int(float(found[1]) * UNITS[found[2]])
    return 0
