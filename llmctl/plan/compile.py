"""Compile programs ahead of time for devices that are not attached. The compiler runs on this machine's CPU."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from llmctl.config.errors import RequestError, WorkError
from llmctl.model.program import Program
from llmctl.plan.topologies import Topology


@dataclass(frozen=True)
class Compiled:
    """Store the result of a compilation: HLO text, and the compiler's memory figures for one device."""

    text: str
    """Optimized HLO text; empty if the program exceeds the device memory."""
    arguments: int
    """Bytes of the arguments. The arguments stay allocated while the program runs."""
    outputs: int
    """Bytes of the outputs that are not aliased to an argument."""
    temporaries: int
    """Bytes of arrays that exist only while the program runs."""
    peak: int
    """Bytes in use at the memory peak, as the compiler reports this figure."""
    required: int
    """Bytes that the program needs, if the compiler rejected the program for lack of device memory. Otherwise 0."""
    seconds: float
    reported_costs: dict[str, float]
    """Cost figures that the compiler itself reports, only for display. The figures count a loop's body once and omit
    custom kernels.
    """


def devices(topology: Topology) -> list[Any]:
    """Return the JAX devices of a topology, from which a mesh can be created."""
    import jax
    from jax.experimental import topologies

    if topology.platform != "tpu":  # CPU devices also stand in for GPUs, whose programs are only lowered
        there = jax.devices("cpu")
        if len(there) < topology.devices:
            raise RequestError(f"plan: {topology.name}: this process has {len(there)} CPU devices")
        return there[: topology.devices]
    return list(topologies.get_topology_desc(**topology.arguments).devices)


def compiled(program: Program) -> Compiled:
    """Compile a program, and return its HLO text and memory figures.

    If the program exceeds the device memory, no error is raised. The result then contains the bytes that the program
    needs.

    Raises:
      WorkError: If the compiler fails for another reason.
    """
    began = time.monotonic()
    try:
        found = program.trace().lower().compile()
    except RequestError:
        raise
    except Exception as e:  # XLA raises the same type for all errors
        required = required_bytes(str(e))
        if not required:
            raise WorkError(f"plan: {program.title} does not compile: {e}") from e
        return Compiled("", 0, 0, 0, 0, required, time.monotonic() - began, {})
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
"""Regular expressions that match libtpu's messages about programs that need too much memory."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def required_bytes(message: str) -> int:
    """Return the required bytes that the compiler's out-of-memory message reports. For other messages, return 0."""
    for pattern in REFUSALS:
        if found := re.search(pattern, message):
            return int(float(found[1]) * UNITS[found[2]])
    return 0
