"""Define sparsity patterns: how many weights are pruned, and among which weights they are selected.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmctl.config.errors import RequestError


@dataclass(frozen=True)
class Pattern:
    """Define a sparsity pattern: prune the fraction `sparsity`, or keep the `keep` best of every `of` inputs (N:M).

    >>> Pattern.parse("2:4", 0.5)
    Pattern(sparsity=0.5, keep=2, of=4)
    """

    sparsity: float
    keep: int = 0
    of: int = 0

    def count(self, inputs: int, outputs: int, per: Literal["matrix", "output"]) -> int:
        """Return the number of zeros in a matrix of an unstructured pattern.

        The fraction `sparsity` is rounded per matrix, or per output.

        >>> Pattern(0.3).count(5, 3, "matrix"), Pattern(0.3).count(5, 3, "output")
        (4, 6)
        """
        return round(self.sparsity * inputs) * outputs if per == "output" else round(self.sparsity * inputs * outputs)

    @staticmethod
    def parse(text: str, sparsity: float) -> Pattern:
        """Return the Pattern for "unstructured" with its sparsity (0 < s < 1), or for "N:M" (keep N of M inputs).

        An N:M pattern implies its sparsity, so the argument `sparsity` is not used.

        Raises:
          RequestError: If the text is neither of the two, or the sparsity is out of range.
        """
        if text == "unstructured":
            if not 0 < sparsity < 1:
                raise RequestError(f"sparsity {sparsity} is outside 0 < sparsity < 1")
            return Pattern(sparsity)
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
            raise RequestError(f'pattern {text!r} is not known; write "unstructured" or N:M with N < M, such as "2:4"')
        return Pattern(1 - int(n) / int(m), int(n), int(m))
