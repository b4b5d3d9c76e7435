"""Encode matrices as blocks of GGUF's quantized types. Quantized matrices keep their integers if possible.

A block stores integers of 32 inputs, and a scale d in float16. The values are:

- q8_0, q5_0, q4_0: d * integer, for integers of 8, 5 and 4 bits
- q5_1, q4_1: d * code + m, for codes from 0 and a float16 number m
- q6_k: d * scale * integer, for integers of 6 bits, an int8 scale for 16 inputs, and one d for 256 inputs

A matrix that llmctl stores as integers keeps the integers if the type can hold them. Only the scales are then rounded
to float16. Other matrices are rounded.

Shapes: R rows (outputs of a matrix, or rows of a table), I inputs, G groups of inputs, N blocks of K inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llmctl.model import weights
from llmctl.model.weights import packed

BLOCK, SUPER, SUB = 32, 256, 16
"""Number of inputs per block, per q6_k block, and per int8 scale of a q6_k block."""
LIMITS = {
    "q8_0": (-128, 127),
    "q6_k": (-32, 31),
    "q5_0": (-16, 15),
    "q5_1": (-16, 15),
    "q4_0": (-8, 7),
    "q4_1": (-8, 7),
}
"""Map from GGUF type to (lowest, highest integer). q5_1 and q4_1 can also store other ranges of the same length."""
BOUND = 1e-15
"""Lower bound of the magnitudes and scales in a q6_k block. Smaller values count as 0, as in llama.cpp."""


class Integers(NamedTuple):
    """Store a matrix as integers and scales. A value is integer * scale."""

    level_RI: np.ndarray
    """The integers, minus the zero points, int32."""
    scale_RG: np.ndarray
    """The scales, float32."""


def integers_of(w: Any, rows: int) -> Integers | None:
    """Return the integers of one matrix, or None if its numbers are not integers.

    Args:
        w: The weight: a matrix [I, O], or an embedding table [V, D].
        rows: Axis of the rows: -1 for a matrix, -2 for a table.
    """
    node = weights.as_node(w)
    if isinstance(node, weights.Packed) and node.format_name.startswith("int"):
        code = packed.unpack(node.codes, packed.BITS[node.format], node.size, node.axis)
        level, scale, zero = packed.levels(node.format, code), node.scale.astype(jnp.float32) * node.whole, node.zero
    elif (stored := node.integers()) is not None:
        level, scale, zero = stored.array.qvalue, stored.array.scale, stored.array.zero_point
    else:
        return None

    def part(a: Any, dtype: Any) -> np.ndarray:
        found = np.asarray(a.astype(dtype))
        return found.T if rows == -1 else found

    level_RI, scale_RG = part(level, jnp.int32), part(scale, jnp.float32)
    if zero is not None:
        level_RI = level_RI - _spread(part(zero, jnp.int32), level_RI.shape[1])
    return Integers(level_RI, np.broadcast_to(scale_RG, (len(level_RI), scale_RG.shape[1])))


def kept(kind: str, found: Integers) -> np.ndarray | None:
    """Return the bytes of a matrix whose integers are stored unchanged, or None if the type cannot hold the integers.

    The scales are rounded to float16. For q6_k, a scale is the product of d and an int8 scale. The int8 scale is chosen
    so that the product is nearest to the scale of the matrix.

    Args:
        kind: The GGUF type, a key of `LIMITS`.
        found: The matrix.
    """
    (rows, inputs), groups = found.level_RI.shape, found.scale_RG.shape[1]
    size = SUPER if kind == "q6_k" else BLOCK
    if inputs % size or (groups > 1 and (inputs // groups) % size):
        return None
    level_NK = found.level_RI.reshape(-1, size)
    scale_N1 = _spread(found.scale_RG, inputs // size).reshape(-1, 1)
    low, high = LIMITS[kind]
    first_N1 = np.full_like(scale_N1, low, np.int32)
    if kind.endswith("_1"):  # a range of other integers begins at the lowest one
        own = level_NK.min(axis=1, keepdims=True)
        first_N1 = np.where((own < low) | (level_NK.max(axis=1, keepdims=True) > high), own, first_N1)
    code_NK = level_NK - first_N1
    if code_NK.min() < 0 or code_NK.max() > high - low:
        return None
    if kind == "q6_k":
        tried = np.arange(1, 128, dtype=np.float32)
        with np.errstate(over="ignore"):
            lost = np.abs((scale_N1 / tried).astype(np.float16).astype(np.float32) * tried - scale_N1)
        factor_N1 = tried[np.argmin(lost, axis=1)][:, None]
        d_N1 = (scale_N1 / factor_N1).astype(np.float16)
        part_NS = np.broadcast_to(factor_N1, (len(d_N1), SUPER // SUB)).astype(np.int8)
        return _k_bytes(code_NK, part_NS, d_N1).reshape(rows, -1) if _usable(d_N1) else None
    with np.errstate(over="ignore"):
        d_N1, m_N1 = scale_N1.astype(np.float16), (first_N1 * scale_N1).astype(np.float16)
    if not _usable(d_N1):
        return None
    parts: list[np.ndarray] = [d_N1.view(np.uint8)]
    if kind.endswith("_1"):
        parts.append(m_N1.view(np.uint8))
    if kind == "q8_0":
        parts.append(level_NK.astype(np.int8).view(np.uint8))
    else:
        if kind.startswith("q5"):
            parts.append(np.packbits((code_NK >> 4).astype(np.uint8), axis=1, bitorder="little"))
        half = (code_NK & 15).astype(np.uint8)
        parts.append(half[:, : BLOCK // 2] | (half[:, BLOCK // 2 :] << 4))
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _usable(d_N1: np.ndarray) -> bool:
    """Return whether the scales d of all blocks are finite and above 0 after rounding to float16."""
    return bool(np.isfinite(d_N1).all() and (d_N1 > 0).all())


def rounded_q6_k(w_RI: np.ndarray) -> np.ndarray:
    """Round a matrix to q6_k, and return its bytes. The scales are the same as in llama.cpp's reference quantizer.

    For every 16 inputs, 19 scales near max|w| / 32 are tried. The chosen scale minimizes the squared error, weighted by
    the squared weights.
    """
    x_NSK = np.ascontiguousarray(w_RI, np.float32).reshape(-1, SUPER // SUB, SUB)
    largest = np.take_along_axis(x_NSK, np.abs(x_NSK).argmax(axis=2)[..., None], axis=2)
    live = np.abs(largest) >= BOUND
    best, scale = np.full(largest.shape, -1.0, np.float32), np.zeros_like(largest)
    square = np.square(x_NSK)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(32 + 0.1 * step) / np.where(live, largest, 1)
        level = np.clip(np.round(inverse * x_NSK), -32, 31)
        product = np.sum(square * x_NSK * level, axis=2, keepdims=True)
        power = np.sum(square * level * level, axis=2, keepdims=True)
        quality = np.where(power > 0, product * product / np.where(power > 0, power, 1), 0)
        better = live & (quality > best)
        scale = np.where(better, product / np.where(power > 0, power, 1), scale)
        best = np.where(better, quality, best)
    scale_NS = scale[..., 0]
    top = np.take_along_axis(scale_NS, np.abs(scale_NS).argmax(axis=1)[:, None], axis=1)
    inverse = np.where(np.abs(top) >= BOUND, -128 / np.where(np.abs(top) >= BOUND, top, 1), 0)
    d_N1 = np.where(inverse == 0, 0, 1 / np.where(inverse == 0, 1, inverse)).astype(np.float16)
    part_NS = np.minimum(np.round(inverse * scale_NS), 127).astype(np.int8)
    step_NS1 = (d_N1.astype(np.float32) * part_NS)[..., None]
    level = np.clip(np.round(x_NSK / np.where(step_NS1 == 0, 1, step_NS1)), -32, 31) * (step_NS1 != 0)
    return _k_bytes(level.reshape(-1, SUPER).astype(np.int32) + 32, part_NS, d_N1).reshape(len(w_RI), -1)


def _k_bytes(code_NK: np.ndarray, part_NS: np.ndarray, d_N1: np.ndarray) -> np.ndarray:
    """Return blocks of q6_k as bytes: the low 4 bits of the codes, the high 2 bits of the codes, int8 scales, and d."""
    code = code_NK.astype(np.uint8).reshape(len(code_NK), 2, 4, BLOCK)
    low, high = code & 15, code >> 4
    low = np.concatenate([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=-1)
    high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    flat = [a.reshape(len(code_NK), -1) for a in (low, high)]
    return np.concatenate([*flat, part_NS.view(np.uint8), d_N1.view(np.uint8)], axis=1)


def _spread(values_RG: np.ndarray, size: int) -> np.ndarray:
    """Repeat the values [R, G] along the last axis, and return an array [R, size]."""
    return np.repeat(values_RG, size // values_RG.shape[1], axis=1)
