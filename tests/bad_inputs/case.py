"""One bad input, and functions that damage valid ones."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOST = "\udce9"
"""How Python spells an argument's byte that is not UTF-8."""
DEEP = b'{"a":' * 100_000
HUGE = 10**30
STAGE = '\n[[stage]]\nkind = "pretrain"'
IMPORT = ["import", "IN/hf", "--out", "OUT"]
GENERATE = ["generate", "IN/art", "--prompt", "a", "--max-new", "1"]
Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A command with a bad input. In its words, IN is the folder of inputs and OUT a path that does not exist."""

    name: str
    argv: list[str]
    uses: tuple[str, ...] = ()
    """Valid inputs to copy."""
    make: Make = lambda inputs: None
    """Damages the copies."""
    stdin: bytes = b""
    code: int = 2
    """Exit code; 0 if the input is harmless, for the reason beside the case."""


def put(name: str, data: bytes | str) -> Make:
    """Return a function that writes a file."""

    def make(inputs: Path) -> None:
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        (inputs / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    return make


def edit(name: str, change: Callable[[Any], Any]) -> Make:
    """Return a function that changes a JSON file in place, or replaces its content by what `change` returns."""

    def make(inputs: Path) -> None:
        content = json.loads((inputs / name).read_text())
        changed = change(content)
        (inputs / name).write_text(json.dumps(content if changed is None else changed))

    return make


def octets(name: str, change: Callable[[bytes], bytes]) -> Make:
    """Return a function that changes the bytes of the files that a pattern matches."""

    def make(inputs: Path) -> None:
        for path in sorted(inputs.glob(name)):
            path.write_bytes(change(path.read_bytes()))

    return make


def both(*makes: Make) -> Make:
    """Return a function that does several changes in turn."""

    def make(inputs: Path) -> None:
        for one in makes:
            one(inputs)

    return make


def header(change: Callable[[dict], Any], file: str) -> Make:
    """Return a function that changes the header of a safetensors file; `change` may return its bytes."""

    def make(inputs: Path) -> None:
        data = (inputs / file).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + length])
        changed = change(content)
        text = changed if isinstance(changed, bytes) else json.dumps(content if changed is None else changed).encode()
        (inputs / file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return make


def nested(levels: int, value: Any = 1) -> Any:
    """Return nested objects."""
    return functools.reduce(lambda inner, _: {"a": inner}, range(levels), value)


def shown(value: Any) -> str:
    return json.dumps(value)[:60]
