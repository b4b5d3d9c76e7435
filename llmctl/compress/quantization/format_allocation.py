"""Choose one format per matrix, so that few bits are stored and the loss increases little.

A mixture is a choice of one format per matrix. Its loss increase is predicted as the sum of the increases that the
single matrices cause. The choice is then a knapsack problem with one choice per matrix, which dynamic programming
solves exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Option(NamedTuple):
    """Describe one format that a matrix may have."""

    format: str
    """Name of the format."""
    bits: int
    """Number of bits that the matrix occupies in this format, scales included."""
    increase: float
    """Increase of the loss if no other matrix is rounded; at least 0."""


class Mixture(NamedTuple):
    """Store one format for each matrix."""

    formats: tuple[str, ...]
    """Names of the formats, in the order of the matrices."""
    bits: int
    """Number of bits of all matrices together."""
    increase: float
    """Predicted increase of the loss: the sum over the matrices."""


def pareto_front(options: Sequence[Sequence[Option]]) -> list[Mixture]:
    """Return all Pareto-optimal mixtures, in ascending order of bits and in descending order of the predicted increase.

    A mixture is Pareto-optimal if two conditions are met:
    - Every mixture with fewer bits has a higher increase.
    - No mixture with equally many bits has a lower increase.

    Matrices are added one after the other. After each matrix, mixtures that are not optimal are removed. Such mixtures
    cannot become optimal later, because every further matrix adds the same options to all mixtures (Nemhauser and
    Ullmann, 1969). Many matrices have equal sizes, so few sums of bits differ, and few mixtures remain.

    >>> q = [Option("int8", 80, 0.0), Option("int4", 40, 0.3)]
    >>> up = [Option("int8", 160, 0.0), Option("int4", 80, 0.1)]
    >>> for mixture in pareto_front([q, up]):
    ...     print(*mixture)
    ('int4', 'int4') 120 0.4
    ('int8', 'int4') 160 0.1
    ('int8', 'int8') 240 0.0

    Args:
      options: the formats that each matrix may have.
    """
    bits, increases = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # per matrix: index of the mixture before it, and its own option
    for own in options:
        all_bits = (bits[:, None] + np.array([option.bits for option in own], np.int64)).ravel()
        all_increases = (increases[:, None] + np.array([option.increase for option in own])).ravel()
        order = np.lexsort((all_increases, all_bits))
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], all_increases[order][:-1])))
        kept = order[(all_increases[order] < best_before) | (np.arange(len(order)) == 0)]
        bits, increases = all_bits[kept], all_increases[kept]
        steps.append(np.divmod(kept, len(own)))
    found = []
    for i in range(len(bits)):
        formats, at = [], i
        for own, (before, chosen) in zip(reversed(options), reversed(steps), strict=True):
            formats.append(own[chosen[at]].format)
            at = before[at]
        found.append(Mixture(tuple(reversed(formats)), int(bits[i]), float(increases[i])))
    return found


def best_within(front: Sequence[Mixture], bits: float) -> Mixture | None:
    """Return the mixture with the lowest predicted increase and at most `bits` bits, from a Pareto front.

    If all mixtures have more bits, return None.
    """
    return next((mixture for mixture in reversed(front) if mixture.bits <= bits), None)


def smallest_within(
    front: Sequence[Mixture], limit: float, measure: Callable[[Mixture], float]
) -> tuple[Mixture | None, float]:
    """Return a mixture with few bits for which `measure` gives at most `limit`, and the measured value.

    The front is searched by bisection, with about log2(number of mixtures) measurements. The value of the returned
    mixture was measured, and the mixture before it on the front exceeds the limit. If the values do not decrease along
    the front, a mixture with still fewer bits may be within the limit.

    If the mixture with the most bits exceeds the limit, return None and the value of this mixture.

    Args:
      front: mixtures in ascending order of bits.
      limit: highest allowed value.
      measure: function that measures the value of a mixture, such as the increase of the perplexity.
    """
    low, high = 0, len(front) - 1
    value = measure(front[high])
    if not value <= limit:  # NaN is not within the limit
        return None, value
    while low < high:
        middle = (low + high) // 2
        tried = measure(front[middle])
        if tried <= limit:
            high, value = middle, tried
        else:
            low = middle + 1
    return front[high], value
