"""Define sparsity patterns: the number of weights to prune, and the groups within which these weights are selected.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmctl.config.errors import RequestError


@dataclass(frozen=True)
class Pattern:
    """Define a sparsity pattern: prune the fraction `sparsity`, or keep `keep` of every `of` inputs (N:M).

    In a block pattern, all weights of a block are pruned together, and `sparsity` is the fraction of blocks.

    >>> Pattern.parse("2:4", 0.5)
    Pattern(sparsity=0.5, keep=2, of=4, block_inputs=1, block_outputs=1)
    """

    sparsity: float
    keep: int = 0
    of: int = 0
    block_inputs: int = 1
    """Number of consecutive inputs of a block."""
    block_outputs: int = 1
    """Number of consecutive outputs of a block."""

    @property
    def blocks(self) -> bool:
        """Return whether blocks of more than one weight are pruned."""
        return self.block_inputs * self.block_outputs > 1

    def count(self, inputs: int, outputs: int, per: Literal["matrix", "output"]) -> int:
        """Return the number of weights to prune in a matrix; in a block pattern, the number of blocks.

        If `per` is "output", every output (or block of outputs) gets the same number. The number for one output is then
        rounded to an integer. Otherwise, the number for the complete matrix is rounded.

        >>> Pattern(0.3).count(5, 3, "matrix"), Pattern(0.3).count(5, 3, "output")
        (4, 6)
        >>> Pattern.parse("4x2", 0.4).count(20, 6, "output")
        6
        """
        inputs, outputs = inputs // self.block_inputs, outputs // self.block_outputs
        return round(self.sparsity * inputs) * outputs if per == "output" else round(self.sparsity * inputs * outputs)

    def check(self, inputs: int, outputs: int, path: str = "") -> None:
        """Check that a matrix can be divided into the groups or blocks of the pattern.

        Args:
          inputs, outputs: shape of the matrix.
          path: path of the matrix, for the error message.

        Raises:
          RequestError: If the M of an N:M pattern does not divide the number of inputs. If the sizes of a block do not
              divide the numbers of inputs and outputs.
        """
        named = f" of {path}" if path else ""
        if self.of and inputs % self.of:
            which = f"the {inputs} inputs{named}" if path else f"{inputs} inputs"
            raise RequestError(f"pattern {self.keep}:{self.of} does not divide {which}")
        if inputs % self.block_inputs or outputs % self.block_outputs:
            raise RequestError(
                f"pattern {self.block_inputs}x{self.block_outputs} does not divide the {inputs} inputs and {outputs} "
                f"outputs{named}"
            )

    @staticmethod
    def parse(text: str, sparsity: float) -> Pattern:
        """Return the Pattern for "unstructured", "AxB" (blocks of A inputs and B outputs) or "N:M" (keep N of M).

        For "unstructured" and "AxB", `sparsity` must be between 0 and 1. An N:M pattern has the sparsity 1 - N / M, and
        the argument `sparsity` is not used.

        Raises:
          RequestError: If the text is not a pattern, or the sparsity is out of range.
        """
        a, cross, b = text.partition("x")
        blocks = bool(cross) and a.isdecimal() and b.isdecimal() and int(a) * int(b) > 1
        if text == "unstructured" or blocks:
            if not 0 < sparsity < 1:
                raise RequestError(f"sparsity {sparsity} is outside 0 < sparsity < 1")
            return Pattern(sparsity, block_inputs=int(a), block_outputs=int(b)) if blocks else Pattern(sparsity)
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
            raise RequestError(
                f'pattern {text!r} is not known; write "unstructured", N:M with N < M, such as "2:4", or the inputs x '
                'outputs of a block, such as "128x1"'
            )
        return Pattern(1 - int(n) / int(m), int(n), int(m))
