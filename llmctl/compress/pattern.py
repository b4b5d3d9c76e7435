"""Sparsity patterns: which weights compete with one another. Imports no JAX, so that settings can be checked early."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.config.errors import RequestError


@dataclass(frozen=True)
class Pattern:
    """Sparsity pattern: prune the lowest share `sparsity`, or all but the best `keep` of every `of` inputs.

    >>> Pattern.parse("2:4", 0.5)
    Pattern(sparsity=0.5, keep=2, of=4)
    """

    sparsity: float
    keep: int = 0
    of: int = 0

    @staticmethod
    def parse(text: str, sparsity: float) -> Pattern:
        """Parse "unstructured" with its sparsity (0 < s < 1), or "N:M" (N kept of M), which implies one.

        Raises:
            RequestError: the text is neither, or the sparsity is out of range.
        """
        if text == "unstructured":
            if not 0 < sparsity < 1:
                raise RequestError(f"sparsity {sparsity} is outside 0 < sparsity < 1")
            return Pattern(sparsity)
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
            raise RequestError(f'pattern {text!r} is not known; write "unstructured" or N:M with N < M, such as "2:4"')
        return Pattern(1 - int(n) / int(m), int(n), int(m))
