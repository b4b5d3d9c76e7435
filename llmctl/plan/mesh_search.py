"""Search the layouts of a training step for the fastest layouts, and for those that need the least memory.

A layout is a mesh, a value of `remat` and a number of microbatches. The analytic model estimates the memory and time of
all layouts. Of the layouts that fit in memory, only the fastest are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmctl.distributed.mesh import AXES
from llmctl.plan import analytic_counts, analytic_memory, roofline
from llmctl.plan.analytic_setup import Setup
from llmctl.plan.topologies import Topology

REMATS = ("none", "minimal", "qkv", "full")
MARGIN = 1.1
"""Tolerance of the memory estimate: a candidate is compiled if its estimate is at most this factor times the
capacity."""


@dataclass(frozen=True)
class Candidate:
    """Store one layout of a training step (mesh, remat, number of microbatches), its memory and its time."""

    setup: Setup
    memory: float
    """Bytes of memory on one device."""
    seconds: float
    """Seconds per step."""
    compiled: bool = False
    recipe: tuple[str, ...] = ()
    """Lines of TOML that set this layout in the stage's table of the recipe."""

    @property
    def axes(self) -> dict[str, int]:
        """Return the sizes of the mesh axes. Axes of size 1 other than "data" are omitted."""
        sizes = {axis: self.setup.size(axis) for axis in AXES}
        return {axis: n for axis, n in sizes.items() if n > 1 or axis == "data"}


Compile = Callable[[Setup], tuple[float, float] | None]
"""Function that compiles the program of a setup, and returns its bytes per device and seconds per step.

If the program exceeds the device memory, the result is None.
"""


def meshes(
    setup: Setup, devices: int, *, axes: Sequence[str] = ("data", "fsdp", "context", "tensor")
) -> Iterator[Setup]:
    """Yield a copy of the setup for every possible mesh of `devices` devices.

    A mesh is possible if its axis sizes divide the model's sizes and the batch.
    """
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


def microbatch_counts(setup: Setup) -> Iterable[int]:
    """Yield the possible numbers of microbatches: the powers of two that divide the number of sequences per device."""
    rows = setup.rows // setup.size("data", "fsdp")
    return (n for n in range(1, rows + 1) if rows % n == 0 and n & (n - 1) == 0)


def modelled(setup: Setup, topology: Topology) -> Candidate:
    """Return a Candidate with the setup's layout, and the memory and time that the analytic model estimates."""
    memory, line = analytic_memory.estimate(setup), roofline.of(analytic_counts.counts(setup), topology, setup.mesh)
    return Candidate(setup, memory.total, line.seconds if line else float("inf"))


def candidates(setup: Setup, topology: Topology) -> list[Candidate]:
    """Return all layouts that fit in memory according to the analytic model. The layouts are sorted by time and then by
    memory."""
    found = []
    for on_mesh in meshes(setup, topology.devices):
        if topology.platform == "tpu" and on_mesh.size("data") % topology.slices:
            continue  # the data axis spans the slices
        for remat in REMATS:
            for accumulate in microbatch_counts(on_mesh):
                one = modelled(replace(on_mesh, remat=remat, accumulate=accumulate), topology)
                if not topology.chip.hbm_bytes or one.memory <= MARGIN * topology.chip.hbm_bytes:
                    found.append(one)
    return sorted(found, key=lambda c: (c.seconds, c.memory))


def front(found: Iterable[Candidate]) -> list[Candidate]:
    """Return the Pareto front of time and memory, from the fastest candidate to the candidate with the least memory.

    A candidate is on the front if no other candidate is faster and also needs less memory.
    """
    out: list[Candidate] = []
    for c in sorted(found, key=lambda c: (c.seconds, c.memory)):
        if not out or c.memory < out[-1].memory:
            out.append(c)
    return out


def search(setup: Setup, topology: Topology, compile_one: Compile, best: int = 4) -> list[Candidate]:
    """Compile candidate layouts, and return the Pareto front of their time and memory.

    The candidates on the Pareto front of the estimates are compiled first. The other candidates follow in the order of
    their estimated times, until `best` compiled programs fit.
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
    """Return (topology, layout) for the first topology on which a compiled program fits. If there is no such topology,
    return None.

    Three layouts are compiled per topology. The analytic model selects these three layouts:

    - the fastest layout that fits in memory
    - the fastest layout that fits in memory and leaves some memory free
    - the layout that needs the least memory
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
