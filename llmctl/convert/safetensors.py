"""Read safetensors files lazily, and write them one tensor at a time.

A file contains the length of its header, the header in JSON, and the raw values. Neither a folder nor a shard is ever
completely in memory. Every dtype of the format maps to a NumPy dtype. Damaged files and pickles are rejected before any
tensor is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmctl.config.containment import regular, within
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.convert.lazy_tensors import Tensor, listed

TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(t): name for name, t in TYPES.items()}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth")
MOST_HEADER = 100_000_000
"""Maximum size of a header in bytes, as the format defines it."""


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name; values are not read yet.

    Raises:
        RequestError: If the file is missing, is no safetensors file, or is truncated.
    """
    try:
        size = regular(path).stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER + 1
            if length > min(MOST_HEADER, size - 8):
                raise RequestError(f"{path}: not a safetensors file, or cut off in its header; fetch it again")
            header = parse_json(f.read(length))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise RequestError(f"{path}: not a readable safetensors file ({e}); fetch it again") from None
    try:
        tensors = {k: _entry(path, v, 8 + length, size) for k, v in header.items() if k != "__metadata__"}
        spans = sorted((*header[k]["data_offsets"], k) for k, t in tensors.items() if t.nbytes)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RequestError(f"{path}: damaged header ({e!r}); fetch it again") from None
    for (_, end, a), (start, _, b) in pairwise(spans):
        if start < end:
            raise RequestError(f"{path}: damaged header (the values of {a} and {b} overlap); fetch it again")
    return tensors


def _entry(path: Path, entry: Mapping[str, Any], start: int, size: int) -> Tensor:
    if entry["dtype"] not in TYPES:
        raise RequestError(f"{path}: tensors of type {entry['dtype']} are not supported")
    dtype, shape = np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError("a size that is no whole number")
    if last - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise ValueError("offsets contradict a shape")
    if start + last > size:
        raise RequestError(
            f"{path}: cut off ({size:,} bytes, its header announces at least {start + last:,}); fetch it again"
        )

    def read() -> np.ndarray:
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", start + first, shape)

    return Tensor(shape, dtype, read)


def read_folder(folder: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Tensor]:
    """Return the tensors of a model folder by name, from one file or from shards with an index.

    If the folder has both a single file and shards, the single file is used, as in transformers. Values are read only
    to compare the file with the shards.

    Args:
        folder: Folder of the model.
        say: Function that is called with one line of text if the folder has both a single file and shards.

    Raises:
        RequestError: If the folder has only a pickle. If a shard is missing or damaged, or the index is wrong. If the
            single file and the shards differ.
    """
    if (folder / SINGLE).is_file():
        whole = read_file(folder / SINGLE)
        if (folder / INDEX).is_file():
            say(f"{folder}: {SINGLE} is taken; {_beside(folder, whole)}")
        return whole
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if pickle := next((p for p in PICKLES if (folder / p).exists()), None):
        raise RequestError(
            f"{folder}: holds a pickle ({pickle}), which can run any code when it is opened, and no safetensors; take "
            "the model's safetensors files, or convert it with transformers where you trust it: "
            "AutoModel.from_pretrained(...).save_pretrained(...)"
        )
    raise RequestError(f"{folder}: no weights there (looked for {SINGLE} and {INDEX})")


def _beside(folder: Path, whole: Mapping[str, Tensor]) -> str:
    """Check that a folder's shards have the same tensors as its single weight file, and describe the shards.

    The description is part of a message to the user.

    Raises:
        RequestError: If the shards contain other tensors than the single file.
    """
    try:
        placed = dict(parse_json((folder / INDEX).read_bytes())["weight_map"])
        gone = sorted(f for f in set(placed.values()) if not within(folder, f).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{INDEX} is damaged"
    if gone:
        return f"{INDEX} is of shards that are not there ({listed(gone)})"
    if set(placed.values()) <= {SINGLE}:
        return f"{INDEX} is of this file"
    shards = _read_shards(folder)
    odd = sorted(whole.keys() ^ shards.keys())
    if odd or (odd := [n for n, t in whole.items() if not _equal(t, shards[n])]):
        raise RequestError(
            f"{folder}: {SINGLE} and the shards of {INDEX} are two different models (they differ in {listed(odd)}); "
            "keep one of them"
        )
    return f"the shards of {INDEX} hold the same"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors have the same bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return np.array_equal(a.read().reshape(-1).view(np.uint8), b.read().reshape(-1).view(np.uint8))


def _read_shards(folder: Path) -> dict[str, Tensor]:
    try:
        placed = dict(parse_json((folder / INDEX).read_bytes())["weight_map"])
        files = sorted(set(placed.values()))
        if odd := [f for f in files if Path(f).name != f]:  # it could be any file of the machine
            raise ValueError(f"a shard outside the folder: {odd[0]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise RequestError(f"{folder / INDEX}: damaged index ({e})") from None
    found: dict[str, Tensor] = {}
    for file in files:
        tensors = read_file(within(folder, file))
        if absent := sorted(k for k, f in placed.items() if f == file and k not in tensors):
            raise RequestError(f"{folder / file}: lacks {listed(absent)}, which the index places there")
        if strays := sorted(tensors.keys() - placed.keys()):
            raise RequestError(f"{folder / file}: holds {listed(strays)}, which the index does not know")
        found |= tensors
    return found


def write_file(path: Path, tensors: Mapping[str, Tensor], wrote: Callable[[int], None] = lambda _: None) -> None:
    """Write tensors to a file, with one tensor at a time in memory.

    Tensors are ordered by item size, then by name.

    Args:
        path: Path of the file.
        tensors: Tensors by name.
        wrote: Function that is called with the size in bytes of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Wider dtypes come first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))
    for name in order:
        t = tensors[name]
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name].read())
            if array.shape != tensors[name].shape or array.dtype != tensors[name].dtype:
                raise ValueError(f"{name} was announced as {tensors[name]}, but is {array.dtype} {array.shape}")
            f.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
            wrote(array.nbytes)


def shards(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Group the names of tensors into shards of at most `most` bytes, in the given order.

    A tensor that is larger than `most` gets its own shard.
    """
    out: list[list[str]] = []
    room = 0
    for name, t in tensors.items():
        if not out or t.nbytes > room:
            out.append([])
            room = most
        out[-1].append(name)
        room -= t.nbytes
    return out


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], most: int, wrote: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Write tensors to one file, or to shards with an index, and return the paths of the weight files.

    A file has at most `most` bytes, unless a single tensor is larger.
    """
    groups = shards(tensors, most)
    files = [SINGLE] if len(groups) <= 1 else [_shard(i, len(groups)) for i in range(len(groups))]
    for file, group in zip(files, groups, strict=True):
        write_file(folder / file, {name: tensors[name] for name in group}, wrote)
    if len(groups) > 1:
        placed = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        total = sum(t.nbytes for t in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    return [folder / f for f in files]


def _shard(i: int, of: int) -> str:
    return f"model-{i + 1:05}-of-{of:05}.safetensors"


def total(tensors: Iterable[Tensor]) -> int:
    """Return the total size of all tensors in bytes."""
    return sum(t.nbytes for t in tensors)
