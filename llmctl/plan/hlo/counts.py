"""Count the FLOPs, HBM bytes and collectives of a compiled step, per device, with the trip counts of loops.

Example:
    >>> text = '''
    ... ENTRY main (a: f32[2,8], b: f32[8,4]) -> f32[2,4] {
    ...   a = f32[2,8]{1,0} parameter(0)
    ...   b = f32[8,4]{1,0} parameter(1)
    ...   ROOT dot = f32[2,4]{1,0} dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }'''
    >>> counts = count(text, {"data": 1})
    >>> counts.flops, counts.bytes
    (128.0, 224.0)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmctl.plan.hlo import hbm_traffic, operations, replica_groups, trip_counts
from llmctl.plan.hlo.parser import Computation, Instruction, Module, parse


@dataclass(frozen=True)
class Collective:
    """Store the counts of all collectives of one kind over one mesh axis: sums over one step, per device."""

    kind: str
    """Kind of the collectives: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute."""
    bytes: float
    """Bytes that a device sends. Each device receives the same number of bytes."""
    axis: str
    """Mesh axis of the collective.

    "data,fsdp" names two axes, "?" means no axis of the mesh, and "slices" means between TPU slices.
    """
    count: float
    """Number of these collectives per step. A collective in a loop counts once per iteration."""
    overlapped: float
    """Number of these collectives that overlap with computation. A collective overlaps if matrix products run between
    the collective's start and the instruction that waits for its result."""
    payload: float = 0.0
    """Bytes of the full arrays: the total size of the inputs or of the outputs, whichever is larger."""
    hidden: float = 0.0
    """Bytes that the overlapped collectives send. The field `bytes` includes these bytes."""


@dataclass(frozen=True)
class Counts:
    """Store the counts of one compiled step, per device."""

    flops: float
    """FLOPs of matrix products and convolutions, without custom kernels."""
    bytes: float
    """Bytes that all operations read from and write to HBM."""
    collectives: list[Collective] = field(default_factory=list)
    flops_by_type: dict[str, float] = field(default_factory=dict)
    """Part of `flops` by operand dtype: bfloat16, int8, …"""
    kernels: dict[str, float] = field(default_factory=dict)
    """Number of executions of each custom kernel (splash attention), by name."""
    kernel_flops: float = 0.0
    """FLOPs of the attention kernels, computed from their shapes because the compiler does not report them."""
    unknown_loops: list[str] = field(default_factory=list)
    """Names of loops whose trip count is unknown. Each of these loops is counted as one iteration."""


def count(hlo_text: str, mesh_axes: Mapping[str, int]) -> Counts:
    """Count the operations, bytes and collectives of a compiled module, per device.

    Args:
      hlo_text: text of the optimized HLO.
      mesh_axes: axes of the mesh and their sizes, in order. Collectives are attributed to these axes.
    """
    module = parse(hlo_text)
    tally = _Counter(module, mesh_axes).of(module.computations[module.entry])
    collectives = [Collective(kind, axis=axis, **sums) for (kind, axis), sums in sorted(tally.collectives.items())]
    return Counts(
        flops=sum(tally.flops.values()),
        bytes=tally.bytes,
        collectives=collectives,
        flops_by_type=tally.flops,
        kernels=tally.kernels,
        kernel_flops=tally.kernel_flops,
        unknown_loops=sorted(tally.unknown),
    )


HOUSEKEEPING = hbm_traffic.FREE_CALLS | {
    "AsyncCollectiveStart", "AsyncCollectiveDone", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "TopK", "SliceId",
    "ZeroCrop", "GatherScatterIndicesBitpacked",
}  # fmt: skip
"""Targets of HLO custom calls that run no kernel, such as a buffer allocation."""
ASYNC_STARTS = ("async-start", "call-start")
"""Opcodes that start an asynchronous computation. The computation of call-start runs on other cores of the chip."""
SLICES = "slices"
"""Value of `Collective.axis` for the network between TPU slices, which is not a mesh axis."""
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass
class _Tally:
    """Accumulate the counts of one execution of an HLO computation, per device."""

    flops: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    collectives: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    kernel_flops: float = 0.0
    unknown: set[str] = field(default_factory=set)

    @property
    def work(self) -> float:
        """Return the FLOPs of matrix products and kernels. These operations can overlap with a collective."""
        return sum(self.flops.values()) + self.kernel_flops

    def hide(self) -> None:
        """Mark all collectives of this tally as overlapped with computation."""
        for sums in self.collectives.values():
            sums |= {"overlapped": sums["count"], "hidden": sums["bytes"]}

    def add(self, other: _Tally, times: float = 1.0, *, bytes_too: bool = True) -> None:
        """Add the counts of `times` executions of `other`.

        If `bytes_too` is false, the HBM bytes of `other` are omitted. The caller then counts them once for the complete
        fusion.
        """
        for mine, theirs in ((self.flops, other.flops), (self.kernels, other.kernels)):
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0.0) + times * value
        self.bytes += times * other.bytes if bytes_too else 0.0
        self.kernel_flops += times * other.kernel_flops
        self.unknown |= other.unknown
        for key, sums in other.collectives.items():
            mine = self.collectives.setdefault(key, dict.fromkeys(sums, 0.0))
            for name, value in sums.items():
                mine[name] += times * value


class _Counter:
    """Count the operations, HBM bytes and collectives of each HLO computation of a program.

    Each result is cached, because several instructions may call the same computation.
    """

    def __init__(self, module: Module, mesh: Mapping[str, int]) -> None:
        self.module, self.mesh = module, mesh
        self.done: dict[str, _Tally] = {}

    def of(self, computation: Computation) -> _Tally:
        """Return the FLOPs, bytes and collectives of one execution of a computation."""
        if computation.name not in self.done:
            tally, tallies = _Tally(), [self.instruction(computation, i) for i in computation.instructions]
            for n, i in enumerate(computation.instructions):
                if i.opcode in ASYNC_STARTS and _hides(computation, n, tallies):
                    tallies[n].hide()
                tally.add(tallies[n])
                if kind := _kind(i):
                    tally.add(self.collective(computation, i, kind, _hides(computation, n, tallies)))
                elif kind := _between_slices(i):
                    size, done = replica_groups.slices_of(i), _received(computation, i)
                    hidden = any(other.work for other in tallies[n + 1 : done])
                    tally.add(_summed(kind, SLICES, size, sum(a.bytes for a in computation.inputs(i)), hidden))
            self.done[computation.name] = tally
        return self.done[computation.name]

    def instruction(self, computation: Computation, i: Instruction) -> _Tally:
        """Return the counts of one execution of the instruction `i`.

        Collectives are omitted, because `collective` counts them.
        """
        tally = _Tally(bytes=hbm_traffic.of(self.module, computation, i))
        flops, dtype = operations.matrix(computation, i)
        if flops:
            tally.flops[dtype] = flops
        if i.opcode == "while":
            iterations = trip_counts.trips(self.module, computation, i)
            tally.add(self.of(self.module.computations[i.called["body"][0]]), 1 if iterations is None else iterations)
            tally.unknown |= {i.name} if iterations is None else set()
        elif i.opcode == "conditional":
            branches = [self.of(self.module.computations[b]) for b in _branches(i)]
            tally.add(max(branches, key=lambda b: (b.work, b.bytes)))
        elif i.opcode == "fusion":
            tally.add(self.of(self.module.computations[i.called["calls"][0]]), bytes_too=False)
        elif i.opcode in ("call", *ASYNC_STARTS):  # asynchronous work is counted at its start
            inner = i.called.get("calls") or i.called["to_apply"]
            tally.add(self.of(self.module.computations[inner[0]]), bytes_too=i.opcode == "call")
        elif i.opcode == "custom-call" and i.target not in HOUSEKEEPING and not flops:
            name = i.name.split(".")[0] if i.target == "tpu_custom_call" else i.target
            tally.kernels[name] = 1.0
            tally.kernel_flops = operations.attention(computation, i)
        return tally

    def collective(self, computation: Computation, i: Instruction, kind: str, hidden: bool) -> _Tally:
        """Return the counts of one execution of the collective `i`, of kind `kind`.

        `hidden` tells whether the collective overlaps with computation.
        """
        group = replica_groups.group_of(i, math.prod(self.mesh.values()))
        if len(group) < 2:
            return _Tally()
        kind = "reduce-scatter" if kind == "all-reduce" and _scatters(computation, i) else kind
        input_bytes = sum(a.bytes for a in computation.inputs(i))
        return _summed(kind, replica_groups.axis_of(group, self.mesh), len(group), input_bytes, hidden)


def _summed(kind: str, axis: str, n: int, input_bytes: float, hidden: bool) -> _Tally:
    """Return the counts of one execution of a collective: the bytes that a device sends, and the overlapped bytes.

    Args:
      kind: kind of the collective (see `Collective`).
      axis: mesh axis.
      n: number of devices of a group.
      input_bytes: bytes of each device's input.
      hidden: whether the collective overlaps with computation.
    """
    payload = input_bytes * n if kind == "all-gather" else input_bytes
    sent = payload * {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
    sums = {
        "bytes": sent,
        "count": 1.0,
        "overlapped": float(hidden),
        "payload": payload,
        "hidden": sent if hidden else 0.0,
    }
    return _Tally(collectives={(kind, axis): sums})


def _branches(i: Instruction) -> list[str]:
    called = i.called
    return called.get("branch_computations") or [called["true_computation"][0], called["false_computation"][0]]


def _kind(i: Instruction) -> str:
    """Return the kind of the collective that starts at `i`; empty if no collective starts there.

    A TPU program repeats an asynchronous collective in every fusion that overlaps the collective. The result is empty
    for repetitions, so that the collective is counted once.
    """
    kind = i.opcode.removesuffix("-start")
    config = i.attributes.partition('"async_collective_fusion_config":')[2].partition("}")[0]
    if kind not in KINDS or (config and '"flag_start":"-1"' not in config):
        return ""
    return kind


def _between_slices(i: Instruction) -> str:
    """Return the kind of the collective to which a send instruction between TPU slices belongs. For other instructions,
    return "".

    In a collective between slices, each device sends its data to a host, and the hosts compute the result.
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes) if i.opcode == "send" else None
    kind = found[1].lower().replace("_", "-") if found else ""
    return {"one-to-one": "collective-permute"}.get(kind, kind)


def _received(computation: Computation, sent: Instruction) -> int:
    """Return the index of the instruction that waits for the reply to `sent`.

    If no instruction waits, return the index of `sent`.
    """
    meeting = sent.attributes.partition('_xla_host_transfer_rendezvous="')[2].partition('"')[0]
    names = [
        i.name for i in computation.instructions if i.opcode == "recv" and f'rendezvous="{meeting}"' in i.attributes
    ]
    ends = (
        n for n, i in enumerate(computation.instructions) if i.opcode == "recv-done" and set(names) & set(i.operands)
    )
    return next(ends, computation.instructions.index(sent))


def _scatters(computation: Computation, i: Instruction) -> bool:
    """Return whether an all-reduce works as a reduce-scatter, that is, whether only slices of its result are read."""
    users = computation.users[i.name]
    return bool(users) and all(u.opcode == "dynamic-slice" for u in users)


def _hides(computation: Computation, n: int, tallies: list[_Tally]) -> bool:
    """Return whether matrix products run between the start and the end of collective `n`."""
    start = computation.instructions[n]
    if any(i.target == "AsyncCollectiveStart" for i in computation.instructions):
        return True  # the fusions of this computation also contain other work
    if not start.opcode.endswith("-start"):
        return False
    work = 0.0
    for i, tally in zip(computation.instructions[n + 1 :], tallies[n + 1 :], strict=True):
        if i.opcode.endswith("-done") and start.name in i.operands:
            return work > 0
        work += tally.work
    return False
