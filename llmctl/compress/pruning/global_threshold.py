"""Choose the number of weights that become zero in each matrix, if the weights of all matrices compete (global
pruning).

One threshold separates the lowest scores of the complete model. This module counts the scores of each matrix that are
below the threshold. Each matrix is then pruned separately, by this number of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from llmctl.compress.pruning.allocation import Counts, LayerAt

Scores = Iterable[tuple[LayerAt, str, Any]]
"""Tuples ((stack, index of the layer), path, scores), one per matrix, as `llmctl.compress.pruning.prune.scored` yields
them."""
HALF = 16
"""Number of bits of a score that are compared per pass."""


def counts(scores: Callable[[], Scores], sparsity: float) -> Counts:
    """Return the number of weights or blocks to prune in each matrix. The sum is round(sparsity * number of scores).

    Two passes over the scores find the exact threshold. The first pass counts the scores by the upper 16 of their 32
    bits. These counts determine the upper bits of the threshold. The second pass counts the scores with the threshold's
    upper bits by their lower 16 bits. Only one matrix at a time is in memory. If several scores equal the threshold,
    the weights in the first matrices are pruned first.

    >>> one = ("decoder", 0), "attn/q", np.array([[1.0, -2.0], [5.0, 3.0]])
    >>> counts(lambda: [one, (("decoder", 1), "attn/q", np.array([[4.0, 3.0]]))], 0.5)
    {('decoder', 0): {'attn/q': 3}, ('decoder', 1): {'attn/q': 0}}

    Args:
      scores: function that returns the scores of all matrices. Every call returns the same scores.
      sparsity: fraction of all scores to prune.
    """
    above = np.zeros(1 << HALF, np.int64)
    for _, _, keys in _ordered(scores()):
        above += np.bincount(keys >> HALF, minlength=1 << HALF)
    total = round(sparsity * int(above.sum()))
    upper = _reached(above, total)
    within = np.zeros(1 << HALF, np.int64)
    near: list[tuple[LayerAt, str, int, np.ndarray]] = []
    for at, module, keys in _ordered(scores()):
        lower = keys[keys >> HALF == upper].astype(np.uint16)
        near.append((at, module, int((keys >> HALF < upper).sum()), lower))
        within += np.bincount(lower, minlength=1 << HALF)
    left = total - int(above[:upper].sum())
    threshold = _reached(within, left)
    equal = left - int(within[:threshold].sum())
    found: Counts = {}
    for at, module, below, lower in near:
        tied = min(equal, int((lower == threshold).sum()))
        equal -= tied
        found.setdefault(at, {})[module] = below + int((lower < threshold).sum()) + tied
    return found


def _ordered(scores: Scores) -> Iterator[tuple[LayerAt, str, np.ndarray]]:
    """Convert the scores of each matrix to a flat array of unsigned integers that have the same order."""
    from llmctl.distributed import host_arrays

    for at, module, score in scores:
        bits = np.ascontiguousarray(host_arrays.read(score), np.float32).reshape(-1).view(np.uint32)
        negative = bits >> 31 == 1
        yield at, module, np.where(negative, ~bits, bits | np.uint32(1 << 31))


def _reached(amounts: np.ndarray, total: int) -> int:
    """Return the first index at which the cumulative sum of `amounts` is at least `total`."""
    return min(int(np.searchsorted(np.cumsum(amounts), max(total, 1))), len(amounts) - 1)
