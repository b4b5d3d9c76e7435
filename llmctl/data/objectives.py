"""Objectives: what a row of packed tokens asks the model to predict. One function each.

Legend: B rows, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Packed:
    """Rows [B, T] of packed documents, before an objective makes inputs and targets of them."""

    rows: np.ndarray
    """int64 [B]: the rows' numbers, for objectives that draw: what they draw must depend on nothing else."""
    tokens: np.ndarray
    """int32; `pad_id` where the segment is 0."""
    next: np.ndarray
    """int32: the token that follows in the same document, even where the row ends; else `pad_id`."""
    follows: np.ndarray
    """bool: whether there is such a token."""
    segments: np.ndarray
    """int32: 0 padding, 1.. documents."""
    positions: np.ndarray
    """int32, from 0 in every segment."""


def causal(packed: Packed) -> Batch:
    """Every token predicts the next one of its document; each token of a document but its first is predicted once."""
    return {
        "tokens": packed.tokens,
        "targets": packed.next,
        "weights": packed.follows.astype(np.float32),
        "segments": packed.segments,
        "positions": packed.positions,
    }
