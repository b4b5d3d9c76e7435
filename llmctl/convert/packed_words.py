"""Pack small signed integers into int32 elements, as the format pack-quantized of compressed-tensors stores them.

An int32 contains several values, the first value in the lowest bits. An offset makes the values unsigned.
"""

from __future__ import annotations

import numpy as np

WORD = 32
"""Number of bits per element."""


def packed_length(inputs: int, bits: int) -> int:
    """Return the number of int32 elements that store `inputs` values of `bits` bits each."""
    return -(-inputs * bits // WORD)


def pack_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed values [out, in] into int32 [out, in * bits / 32].

    The last int32 of a row is padded with zero bits.
    """
    per_word = WORD // bits
    shifted = (values.astype(np.int32) + (1 << (bits - 1))).astype(np.uint32)
    shifted = np.pad(shifted, ((0, 0), (0, -values.shape[1] % per_word))).reshape(len(values), -1, per_word)
    words = np.bitwise_or.reduce(shifted << (bits * np.arange(per_word, dtype=np.uint32)), axis=2)
    return words.astype(np.uint32).view(np.int32)


def unpack_words(words: np.ndarray, inputs: int, bits: int) -> np.ndarray:
    """Unpack int32 elements to signed int8 values [out, inputs]; inverse of `pack_words`."""
    shifts = bits * np.arange(WORD // bits, dtype=np.uint32)
    parts = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & ((1 << bits) - 1)
    return (parts.reshape(len(words), -1)[:, :inputs].astype(np.int32) - (1 << (bits - 1))).astype(np.int8)
