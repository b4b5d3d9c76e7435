"""Sparsity patterns: which weights compete for a place. Imports no JAX, so that a request is checked before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.config.errors import RequestError


@dataclass(frozen=True)
class Pattern:
    """Which weights go: the lowest `sparsity` of a matrix or output, all but the best `keep` of every `of` inputs."""

    sparsity: float
    keep: int = 0
    of: int = 0

    @staticmethod
    def parse(text: str, sparsity: float) -> Pattern:
        """ "unstructured" with its sparsity (0 < s < 1), or "N:M" (N kept of M), which has its own.

        Raises RequestError for anything else.
        """
        if text == "unstructured":
            if not 0 < sparsity < 1:
                raise RequestError(f"sparsity {sparsity} is outside 0 < sparsity < 1")
            return Pattern(sparsity)
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
            raise RequestError(f'pattern {text!r} is not known; write "unstructured" or N:M with N < M, such as "2:4"')
        return Pattern(1 - int(n) / int(m), int(n), int(m))
