"""Encode and decode pruned arrays for an artifact's folder. Only nonzero elements and their positions are stored.

In memory, a pruned array is dense, as products and training require. An artifact may store the array in one of two
formats:

- "bitmask": the nonzero elements in row-major order, and a bitmask with one bit per element, the lowest bit first.
- "2:4": for every four consecutive inputs of an output, two elements and two indices of 2 bits. A byte contains the
  indices of two groups, the first group in the lower 4 bits.

An element counts as zero if all its bits are 0. The number -0.0 is therefore stored, and decoding is exact. The array
is never encoded in a format that has more bytes than the dense array.

Example:
  >>> import numpy as np
  >>> a = np.array([[0, 3], [1, 0], [0, 0], [2, -0.0]], np.float32)
  >>> record, parts = encode(a)
  >>> record, {name: part.tolist() for name, part in parts.items()}
  ({'format': '2:4'}, {'indices': [205], 'values': [[1.0, 3.0], [2.0, -0.0]]})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.fingerprint import type_bits

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Any]
"""JSON data about one encoded array in a manifest: "format", and for a bitmask the number of "values"."""

BITMASK, TWO_OF_FOUR = "bitmask", "2:4"
FEWER = 0.95
"""Minimum fraction of nonzero elements among the elements that the 2:4 format stores. With a smaller fraction, the
bitmask format needs fewer bytes."""


def encode(a: np.ndarray) -> tuple[Record, dict[str, np.ndarray]] | None:
    """Return the record and the parts of an encoded array, or None if no format needs fewer bytes.

    Args:
        a: Array [..., inputs, outputs].
    """
    import numpy as np

    nonzero = _bits(a) != 0
    count = int(np.count_nonzero(nonzero))
    width = type_bits(str(a.dtype))
    if count * width + a.size >= a.size * width:
        return None
    if a.ndim >= 2 and a.shape[-2] % 4 == 0 and count >= FEWER * a.size / 2:
        nonzero_G4O = nonzero.reshape(*a.shape[:-2], -1, 4, a.shape[-1])
        code_GO = np.bitwise_or.reduce(nonzero_G4O << np.arange(4, dtype=np.uint8)[:, None], axis=-2)
        if (_counts()[code_GO] <= 2).all():
            indices_GO = _indices()[code_GO]
            values = np.take_along_axis(a.reshape(nonzero_G4O.shape), _positions(indices_GO), axis=-2)
            nibbles = np.pad(indices_GO.reshape(-1), (0, indices_GO.size % 2))
            parts = {"indices": nibbles[::2] | nibbles[1::2] << 4, "values": values.reshape(_halved(a.shape))}
            return {"format": TWO_OF_FOUR}, parts
    bitmask = np.packbits(nonzero.reshape(-1), bitorder="little")
    return {"format": BITMASK, "values": count}, {"bitmask": bitmask, "values": a.reshape(-1)[nonzero.reshape(-1)]}


def encode_all(
    arrays: Mapping[str, Mapping[str, Any]], names: frozenset[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Record]]:
    """Encode some arrays of a model. All processes must call this function.

    Args:
        arrays: Arrays of each weight, {path of the weight: {name in the weight: array}}.
        names: Full names of the arrays to encode.

    Returns:
        The argument `arrays`, with a dictionary of parts in place of each encoded array, and the records by full name.
        An array stays unchanged if no encoding has fewer bytes.
    """
    from llmctl.distributed import host_arrays
    from llmctl.model import weights

    out, records = {}, {}
    for path, own in arrays.items():
        out[path] = dict(own)
        for part, a in own.items():
            name = weights.join(path, part)
            if name in names and (found := encode(host_arrays.read(a))):
                records[name], out[path][part] = found
    return out, records


def stored(record: Record, shape: tuple[int, ...], dtype: Any) -> dict[str, np.ndarray]:
    """Allocate host arrays for reading the parts of an encoded array.

    Args:
        record: Record of the encoded array in the manifest.
        shape: Shape of the dense array.
        dtype: Dtype of the dense array.

    Raises:
        ValueError: If the record does not describe an array of this shape.
    """
    import numpy as np

    size, kind = math.prod(shape), record.get("format")
    if kind == TWO_OF_FOUR and record.keys() == {"format"} and len(shape) >= 2 and shape[-2] % 4 == 0:
        return {"indices": np.empty(-(-size // 8), np.uint8), "values": np.empty(_halved(shape), dtype)}
    count = record.get("values")
    if kind == BITMASK and record.keys() == {"format", "values"} and type(count) is int and 0 <= count <= size:
        return {"bitmask": np.empty(-(-size // 8), np.uint8), "values": np.empty(count, dtype)}
    raise ValueError(f"the sparse format {str(record)[:80]} is not known for an array of shape {list(shape)}")


def nonzero(record: Record, shape: tuple[int, ...]) -> float:
    """Return the number of stored elements of an encoded array, as a fraction of the dense array's elements."""
    return 0.5 if record["format"] == TWO_OF_FOUR else record["values"] / max(math.prod(shape), 1)


def size(record: Record, shape: tuple[int, ...], dtype: Any) -> int:
    """Return the number of bytes of an encoded array, without compression."""
    elements, width = math.prod(shape), type_bits(str(dtype))
    return -(-elements // 8) + math.ceil(nonzero(record, shape) * elements * width / 8)


def decode(record: Record, parts: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Decode an array to its dense form. This is the inverse of `encode`.

    Raises:
        ValueError: If the parts contradict the record or one another.
    """
    import numpy as np

    values, size = parts["values"], math.prod(shape)
    if any(parts[name].shape != part.shape for name, part in stored(record, shape, values.dtype).items()):
        raise ValueError("its parts have other shapes than the manifest says")
    dense = np.zeros(shape, values.dtype)
    if record["format"] == BITMASK:
        bits = np.unpackbits(parts["bitmask"], bitorder="little")
        marked = int(np.count_nonzero(bits))
        if marked != len(values) or bits[size:].any():
            raise ValueError(f"its bitmask marks {marked:,} elements, and {len(values):,} are stored")
        dense.reshape(-1)[bits[:size].view(bool)] = values
        return dense
    groups = (*shape[:-2], shape[-2] // 4, 4, shape[-1])
    nibbles = np.stack([parts["indices"] & 15, parts["indices"] >> 4], axis=-1).reshape(-1)
    indices_GO, spare = nibbles[: size // 4].reshape(*groups[:-2], groups[-1]), nibbles[size // 4 :]
    if spare.any() or not np.isin(indices_GO, np.unique(_indices()[_counts() <= 2])).all():
        raise ValueError("its 2-bit indices are not two increasing positions of each four")
    values_G2O = values.reshape(*groups[:-2], 2, groups[-1])
    np.put_along_axis(dense.reshape(groups), _positions(indices_GO), values_G2O, axis=-2)
    return dense


def _bits(a: np.ndarray) -> np.ndarray:
    """Return the elements of an array as unsigned integers with the same bits."""
    import numpy as np

    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")


def _halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-2] // 2, shape[-1])


def _counts() -> np.ndarray:
    """Return the number of set bits of each 4-bit integer."""
    import numpy as np

    return np.array([code.bit_count() for code in range(16)])


def _indices() -> np.ndarray:
    """Return a table with one byte per 4-bit mask: the positions of the mask's set bits, as two 2-bit integers.

    The lower position is in the lower 2 bits. If fewer than two bits are set, positions of unset bits are added.
    Entries of masks with more than two set bits are not used.
    """
    import numpy as np

    def pair(code: int) -> int:
        order = sorted(range(4), key=lambda i: not code >> i & 1)
        low, high = sorted(order[:2])
        return low | high << 2

    return np.array([pair(code) for code in range(16)], np.uint8)


def _positions(indices_GO: np.ndarray) -> np.ndarray:
    """Decode the positions of the two stored elements in each group of four elements, int [..., 2, O].

    Args:
        indices_GO: Integers [..., O], one per group. Each integer contains both positions (see `_indices`).
    """
    import numpy as np

    return np.stack([indices_GO & 3, indices_GO >> 2], axis=-2).astype(np.intp)
