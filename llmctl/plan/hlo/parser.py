"""Parse compiled HLO text into computations and instructions, with the details that counting needs.

The input is the result of `compiled.as_text()`: optimized, scheduled, with layouts. The parser accepts the output of
all backends, which differ in percent signs, memory spaces and attributes over several lines.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
}  # fmt: skip
"""Bits per element of each HLO dtype. Types that are not listed have 8 bits (float8) or none (HLO's type `token`)."""
DEVICE = 0
"""Number of the memory space that is HBM. On-chip memories (VMEM, SMEM) and host memory have other numbers."""

_LEAF = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=\"\w+\")?$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAMES = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Array:
    """Store dtype, shape and memory space of one array."""

    dtype: str
    dims: tuple[int, ...]
    space: int = DEVICE

    @property
    def size(self) -> int:
        """Return the number of elements of the array."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Return the size of the array in bytes, without the padding of tiled layouts."""
        return self.size * BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0) / 8

    @property
    def hbm(self) -> float:
        """Return the size in bytes if the array is in HBM, otherwise 0."""
        return self.bytes if self.space == DEVICE else 0.0


@dataclass
class Instruction:
    """Store one instruction of an HLO computation, and parse its attributes."""

    name: str
    opcode: str
    arrays: list[Array]
    """Arrays in the result, in order. A result that is not a tuple has one array."""
    operands: list[str]
    inside: str
    """Text between the instruction's parentheses: its operands, or the value of a constant."""
    attributes: str
    root: bool = False

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """Return the called computations by attribute: calls, body, condition, to_apply, branch_computations, …"""
        found: dict[str, list[str]] = {}
        for key, many, one in re.findall(r"(\w+)=(?:\{((?:%[\w.\-]+(?:, )?)+)\}|%([\w.\-]+))", self.attributes):
            found[key] = _NAMES.findall(many) if many else [one]
        return found

    def attribute(self, name: str) -> str:
        """Return the text of an attribute up to the next attribute, or an empty string if the attribute is missing."""
        found = re.search(rf"(?:^|[ ,]){name}=(\{{[^}}]*\}}|[^,\s]*)", self.attributes)
        return found[1] if found else ""

    def numbers(self, name: str) -> list[int]:
        """Return the integers of an attribute such as lhs_contracting_dims={1,2}."""
        return [int(n) for n in re.findall(r"-?\d+", self.attribute(name))]

    @property
    def target(self) -> str:
        """Return the target of a custom call, or an empty string for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Computation:
    """Store the instructions of a computation, in execution order."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Return the instructions of the computation, by name."""
        return {i.name: i for i in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        """Return the root instruction, whose result is the result of the computation."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Return {name of an instruction: instructions that read its result}."""
        found: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
        for i in self.instructions:
            for name in dict.fromkeys(i.operands):
                found.setdefault(name, []).append(i)
        return found

    @cached_property
    def parameters(self) -> list[Instruction]:
        """Return the instructions that are parameters, in the order of their parameter numbers."""
        return sorted((i for i in self.instructions if i.opcode == "parameter"), key=lambda i: int(i.inside))

    def operand(self, i: Instruction, n: int) -> Instruction:
        """Return the instruction that produces operand `n` of `i`, counted from 0."""
        return self.by_name[i.operands[n]]

    def inputs(self, i: Instruction) -> list[Array]:
        """Return the arrays that `i` reads."""
        return [a for name in i.operands for a in self.by_name[name].arrays]


@dataclass
class Module:
    """Store a compiled program: its computations by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Return the computations and instructions in the text of a compiled module.

    Raises:
      ValueError: If the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if current is None:
            if header := _HEADER.match(line):
                current = Computation(header[2])
                computations[current.name] = current
                entry = current.name if header[1] else entry
        elif _END.match(line):
            current = None
        elif (start := _START.match(line)) and (found := _instruction(line, start)):
            current.instructions.append(found)
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled module")
    return Module(computations, entry)


def _logical_lines(text: str) -> list[str]:
    """Split the text into lines, one per instruction.

    Continuation lines are joined, because attributes may contain newlines.
    """
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        starts = not inside or _END.match(line) or _START.match(line)
        if inside and not starts:
            out[-1] += " " + line
            continue
        out.append(line)
        if not inside and _HEADER.match(line):
            inside = True
        elif _END.match(line):
            inside = False
    return out


def _instruction(line: str, start: re.Match[str]) -> Instruction | None:
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opens = rest.find("(")
    if opens < 0:
        return None
    closes = _closing(rest, opens)
    inside = _COMMENT.sub("", rest[opens + 1 : closes])
    opcode = rest[:opens]
    operands = [] if opcode in ("constant", "parameter", "iota") else _operands(inside)
    return Instruction(start[2], opcode, arrays(kind), operands, inside, rest[closes + 1 :], bool(start[1]))


def _operands(inside: str) -> list[str]:
    names = _NAMES.findall(inside)
    return names or [part.split()[-1] for part in inside.split(",") if part.strip()]


def _closing(text: str, opens: int) -> int:
    """Return the position of the parenthesis that closes the parenthesis at `opens`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opens):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def arrays(kind: str) -> list[Array]:
    """Parse an HLO type, such as f32[2,8]{1,0:T(8,128)S(1)} or a tuple of types, and return the arrays in it."""
    found = []
    for dtype, dims, layout in _LEAF.findall(_COMMENT.sub("", kind)):
        space = _SPACE.search(layout or "")
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, int(space[1]) if space else DEVICE))
    return found
