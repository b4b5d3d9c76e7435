"""The best ways to lay a step over a slice: every mesh, recomputation and accumulation, by the model first.

Few programs are compiled: those that the model finds fastest among the ones that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmctl.plan import analytic_counts, analytic_memory, roofline
from llmctl.plan.analytic_memory import Setup
from llmctl.plan.topologies import Topology

REMATS = ("none", "minimal", "qkv", "full")
MARGIN = 1.1
"""The model may be that much above what it says fits: what it is wrong by, and more is compiled than refused."""


@dataclass(frozen=True)
class Candidate:
    """A way to run a step, and what it costs."""

    setup: Setup
    memory: float
    """Bytes of one device."""
    seconds: float
    """A step."""
    compiled: bool = False
    recipe: tuple[str, ...] = ()
    """Lines of the stage's recipe that say so."""

    @property
    def axes(self) -> dict[str, int]:
        """The mesh, without the axes that are not used."""
        sizes = {axis: self.setup.size(axis) for axis in analytic_memory.AXES}
        return {axis: n for axis, n in sizes.items() if n > 1 or axis == "data"}


Compile = Callable[[Setup], tuple[float, float] | None]
"""A setup -> (bytes of one device, seconds a step) of the compiled program, or None where it does not fit."""


def meshes(
    setup: Setup, devices: int, *, axes: Sequence[str] = ("data", "fsdp", "context", "tensor")
) -> Iterator[Setup]:
    """The step on every mesh of `devices` that divides the model and the batch."""
    model = setup.model
    for sizes in _splits(devices, len(axes)):
        mesh = dict.fromkeys(analytic_memory.AXES, 1) | dict(zip(axes, sizes, strict=True))
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
    """Every way to write `number` as a product of so many factors, in order."""
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in _splits(number // first, parts - 1))


def pieces(setup: Setup) -> Iterable[int]:
    """Numbers of microbatches that divide the batch over the mesh."""
    rows = setup.rows // setup.size("data", "fsdp")
    return (n for n in range(1, rows + 1) if rows % n == 0 and n & (n - 1) == 0)


def modelled(setup: Setup, topology: Topology) -> Candidate:
    """What the model says of a step."""
    memory, line = analytic_memory.estimate(setup), roofline.of(analytic_counts.counts(setup), topology, setup.mesh)
    return Candidate(setup, memory.total, line.seconds if line else float("inf"))


def candidates(setup: Setup, topology: Topology) -> list[Candidate]:
    """Every way that the model finds to fit, fastest first, the emptier memory first among equals."""
    found = []
    for on_mesh in meshes(setup, topology.devices):
        if topology.platform == "tpu" and on_mesh.size("data") % topology.slices:
            continue  # the data axis runs over the slices
        for remat in REMATS:
            for accumulate in pieces(on_mesh):
                one = modelled(replace(on_mesh, remat=remat, accumulate=accumulate), topology)
                if not topology.chip.hbm_bytes or one.memory <= MARGIN * topology.chip.hbm_bytes:
                    found.append(one)
    return sorted(found, key=lambda c: (c.seconds, c.memory))


def front(found: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and memory, fastest first (the Pareto front)."""
    out: list[Candidate] = []
    for c in sorted(found, key=lambda c: (c.seconds, c.memory)):
        if not out or c.memory < out[-1].memory:
            out.append(c)
    return out


def search(setup: Setup, topology: Topology, compile_one: Compile, best: int = 4) -> list[Candidate]:
    """The front of the compiled programs; `best` of them are compiled, taken from the model's front, then its fastest.

    One that turns out not to fit is left out, and the next takes its place.
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
    """The smallest of `slices` (ordered) on which a compiled program fits, and that program; None where none does.

    Tried are the fastest by the model, the fastest that fits however wrong the model is, and the emptiest.
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
