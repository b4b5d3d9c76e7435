"""Store the outcome of an attack on several texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Outcome:
    """Store whether each text is still classified correctly, and the number of substitutions that an attack made.

    Shapes: N texts.
    """

    right_N: np.ndarray
    """Whether the classifier is right about each text, bool."""
    edits_N: np.ndarray
    """Number of substitutions in each text."""
    budget_N: np.ndarray
    """Maximum number of substitutions in each text."""

    @classmethod
    def before(cls, right_N: np.ndarray, budget_N: np.ndarray) -> Outcome:
        """Return the outcome before the first substitution. Texts that are classified wrongly are never attacked."""
        return cls(np.array(right_N, bool), np.zeros(len(right_N), np.int64), budget_N.copy())

    def active(self) -> np.ndarray:
        """Return the indices of the texts that are classified correctly and whose budget is not used up."""
        return np.flatnonzero(self.right_N & (self.edits_N < self.budget_N))

    def give_up(self, rows_K: np.ndarray) -> None:
        """End the attack on some texts, because no substitution is left."""
        self.budget_N[rows_K] = self.edits_N[rows_K]


def budget(fraction: float, count: int) -> int:
    """Return the maximum number of substitutions in a text with `count` tokens or words; at least one.

    Example:
        >>> [budget(0.15, count) for count in (0, 3, 20, 39)], budget(0.29, 100)
        ([0, 1, 3, 5], 29)
    """
    return min(max(int(fraction * count + 1e-9), 1), count)  # 0.29 * 100 is less than 29
