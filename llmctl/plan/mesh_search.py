"""Search the meshes, recomputations and accumulations of a step for the fastest and the smallest.

The analytic model ranks all of them. Only the fastest programs that fit, as estimated by the model, are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmctl.distributed.mesh import AXES
from llmctl.plan import analytic_counts, analytic_memory, roofline
from llmctl.plan.analytic_memory import Setup
from llmctl.plan.topologies import Topology

REMATS = ("none", "minimal", "qkv", "full")
MARGIN = 1.1
"""Tolerance of the memory estimate: a candidate is compiled if its estimate is at most this factor times the
capacity."""


@dataclass(frozen=True)
class Candidate:
    """Store one layout of a step (mesh, remat, accumulation) and its cost."""

    setup: Setup
    memory: float
    """Bytes of memory on one device."""
    seconds: float
    """Seconds per step."""
    compiled: bool = False
    recipe: tuple[str, ...] = ()
    """Lines that set this layout in the stage's recipe."""

    @property
    def axes(self) -> dict[str, int]:
        """Return the mesh without axes of size 1, except "data"."""
        sizes = {axis: self.setup.size(axis) for axis in AXES}
        return {axis: n for axis, n in sizes.items() if n > 1 or axis == "data"}


Compile = Callable[[Setup], tuple[float, float] | None]
"""Function from a setup to (bytes of one device, seconds per step). It returns None if the setup does not fit."""


def meshes(
    setup: Setup, devices: int, *, axes: Sequence[str] = ("data", "fsdp", "context", "tensor")
) -> Iterator[Setup]:
    """Yield the setup with every mesh of `devices` devices that divides the model and the batch."""
    model = setup.model
    for sizes in _splits(devices, len(axes)):
        mesh = dict.fromkeys(AXES, 1) | dict(zip(axes, sizes, strict=True))
        split, tensor, context = mesh["fsdp"] * mesh["context"], mesh["tensor"], mesh["context"]
        fits = (
            not any(n % tensor for n in (model.heads, model.kv_heads, model.d_ff, model.vocab_size))
            and not model.d_model % split
            and not setup.rows % (mesh["data"] * mesh["fsdp"])
            and not setup.seq_len % (2 * context if context > 1 else 1)
        )
        if fits:
            yield replace(setup, mesh=mesh, fused=setup.fused and context == 1)


def _splits(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every ordered factorization of `number` into `parts` factors."""
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in _splits(number // first, parts - 1))


def pieces(setup: Setup) -> Iterable[int]:
    """Return the numbers of microbatches, powers of two, that divide the batch over the mesh."""
    rows = setup.rows // setup.size("data", "fsdp")
    return (n for n in range(1, rows + 1) if rows % n == 0 and n & (n - 1) == 0)


def modelled(setup: Setup, topology: Topology) -> Candidate:
    """Return the setup with its cost as estimated by the analytic model."""
    memory, line = analytic_memory.estimate(setup), roofline.of(analytic_counts.counts(setup), topology, setup.mesh)
    return Candidate(setup, memory.total, line.seconds if line else float("inf"))


def candidates(setup: Setup, topology: Topology) -> list[Candidate]:
    """Return every layout that fits according to the model: fastest first, then smallest first."""
    found = []
    for on_mesh in meshes(setup, topology.devices):
        if topology.platform == "tpu" and on_mesh.size("data") % topology.slices:
            continue  # the data axis spans the slices
        for remat in REMATS:
            for accumulate in pieces(on_mesh):
                one = modelled(replace(on_mesh, remat=remat, accumulate=accumulate), topology)
                if not topology.chip.hbm_bytes or one.memory <= MARGIN * topology.chip.hbm_bytes:
                    found.append(one)
    return sorted(found, key=lambda c: (c.seconds, c.memory))


def front(found: Iterable[Candidate]) -> list[Candidate]:
    """Return the Pareto front of time and memory, fastest first."""
    out: list[Candidate] = []
    for c in sorted(found, key=lambda c: (c.seconds, c.memory)):
        if not out or c.memory < out[-1].memory:
            out.append(c)
    return out


def search(setup: Setup, topology: Topology, compile_one: Compile, best: int = 4) -> list[Candidate]:
    """Return the Pareto front of time and memory of the compiled programs.

    The candidates on the model's Pareto front are compiled first. The others follow in the order of the model's time,
    until `best` of them fit.
    """
    ordered = candidates(setup, topology)
    first = front(ordered)
    queue = [*first, *(c for c in ordered if c not in first)]
    done: list[Candidate] = []
    for c in queue[: 3 * best]:
        if len(done) == best:
            break
        if measured := compile_one(c.setup):
            done.append(Candidate(c.setup, *measured, compiled=True))
    return front(done)


def fit(setup: Setup, slices: Iterable[Topology], compile_one: Compile) -> tuple[Topology, Candidate] | None:
    """Return the first of `slices` on which a compiled program fits, and the program; None if there is none.

    Three candidates are compiled per slice: the fastest according to the model, the fastest with a margin of memory,
    and the smallest.
    """
    for topology in slices:
        ordered = candidates(setup, topology)
        safe = [c for c in ordered if c.memory * MARGIN <= topology.chip.hbm_bytes]
        emptiest = sorted(ordered, key=lambda c: c.memory)
        tries = [*ordered[:1], *safe[:1], *emptiest[:1]]
        for c in (c for n, c in enumerate(tries) if c not in tries[:n]):
            measured = compile_one(c.setup)
            if measured and measured[0] <= topology.chip.hbm_bytes:
                return topology, Candidate(c.setup, *measured, compiled=True)
    return None
