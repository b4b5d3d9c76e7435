"""Average attributions per token over the texts of each target, such as the texts that are predicted as one class.

Example:
    >>> import numpy as np
    >>> from llmctl.evaluate.attribution.explain import Explanation
    >>> from llmctl.evaluate.attribution.inputs import Piece
    >>> pieces = [Piece("good", "text", 0, 0, 4), Piece(" good", "text", 0, 4, 9)]
    >>> averages([Explanation(pieces, ["good good"], np.array([1.0, 3.0]), "yes", 2.0)])
    {'yes': [Average(token='good', mean=2.0, count=2)]}
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmctl.evaluate.attribution.explain import Explanation
from llmctl.evaluate.attribution.inputs import TEXT

RARE = 2
"""Minimum number of occurrences of an averaged token. One occurrence says little about a class."""


class Average(NamedTuple):
    """Store the mean attribution of a token, and the number of its occurrences."""

    token: str
    mean: float
    count: int


def averages(found: Sequence[Explanation], rare: int = RARE) -> dict[str, list[Average]]:
    """Return the mean attribution of each token by target, the largest mean first.

    White space around a token is not part of it. Tokens of white space, and tokens with fewer than `rare` occurrences
    in the texts of a target, are left out.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        for piece, value in one.units:
            if piece.kind == TEXT and (token := piece.text.strip()):
                values[one.target][token].append(value)
    out = {}
    for target, own in sorted(values.items()):
        means = [Average(token, float(np.mean(v)), len(v)) for token, v in own.items() if len(v) >= rare]
        if means:
            out[target] = sorted(means, key=lambda a: (-a.mean, a.token))
    return out


def extremes(means: Sequence[Average], top: int) -> tuple[list[Average], list[Average]]:
    """Return at most `top` tokens with the largest positive means, and those with the largest negative means."""
    return [a for a in means if a.mean > 0][:top], [a for a in reversed(means) if a.mean < 0][:top]
