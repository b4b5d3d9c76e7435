"""Pad prompts of unequal length to arrays of few shapes, so that few programs are compiled.

Example:
    >>> tokens_BT, segments_BT = left_padded([[5, 6, 7], [8]], multiple=4)
    >>> tokens_BT.tolist(), segments_BT.tolist()
    ([[0, 5, 6, 7], [0, 0, 0, 8]], [[0, 1, 1, 1], [0, 0, 0, 1]])

A slot is one position along the sequence axis of an array or of the key-value cache.

Shapes: B rows, T prompt slots, S encoder tokens, E end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = -1
"""Token id that generation returns at positions after the end of a row."""

ROUND = 64
"""Multiple to which lengths of prompts and caches are rounded up, so that programs are compiled for few lengths."""


class Prompts(NamedTuple):
    """Store padded prompts, the inputs of `Decoder.read`."""

    tokens_BT: Any
    segments_BT: Any
    source: dict[str, Any]
    """Arrays that the encoder reads, by name; empty for a model without an encoder."""


def padded_ends(ends: Sequence[int]) -> np.ndarray:
    """Return the end tokens as int32 [E], padded with NOTHING to at least 8 entries.

    The padding avoids a compilation for every number of end tokens. The padding ends no row, because only rows that
    have already ended generate NOTHING.
    """
    return np.array([*ends, *[NOTHING] * max(0, 8 - len(ends))], np.int32)


def left_padded(prompts: Sequence[Sequence[int]], multiple: int = ROUND) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts on the left, and return their tokens and segments, int32 [B, T] each.

    T is the length of the longest prompt, rounded up to a multiple of `multiple`. Segments are 0 at padding and 1
    elsewhere.
    """
    T = round_up(max(map(len, prompts)), multiple)
    tokens_BT = np.zeros((len(prompts), T), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for b, prompt in enumerate(prompts):
        tokens_BT[b, T - len(prompt) :] = prompt
        segments_BT[b, T - len(prompt) :] = 1
    return tokens_BT, segments_BT


def right_padded(prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Pad prompts on the right, and return three arrays, int32 [B, S] each.

    The arrays are `encoder_tokens`, `encoder_segments` and `encoder_positions`.
    """
    S = round_up(max(map(len, prompts)))
    tokens_BS = np.zeros((len(prompts), S), np.int32)
    segments_BS = np.zeros_like(tokens_BS)
    for b, prompt in enumerate(prompts):
        tokens_BS[b, : len(prompt)] = prompt
        segments_BS[b, : len(prompt)] = 1
    positions_BS = np.arange(S, dtype=np.int32) * segments_BS
    return {"encoder_tokens": tokens_BS, "encoder_segments": segments_BS, "encoder_positions": positions_BS}


def round_up(n: int, multiple: int = ROUND) -> int:
    """Round `n` up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple
