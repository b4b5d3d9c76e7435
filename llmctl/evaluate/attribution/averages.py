"""Average attributions per word over the texts of each target, such as the texts that are predicted as one class.

A word is a token, or several adjacent tokens that meet at letters or digits. Its attribution is the sum of its tokens'
attributions. Letters of scripts without upper and lower case do not join tokens, because such scripts may have no
spaces.

Example:
    >>> import numpy as np
    >>> from llmctl.evaluate.attribution.explain import Explanation
    >>> from llmctl.evaluate.attribution.inputs import Piece
    >>> pieces = [Piece("good", "text", 0, 0, 4), Piece(" good", "text", 0, 4, 9)]
    >>> averages([Explanation(pieces, ["good good"], np.array([1.0, 3.0]), "yes", 2.0)])
    {'yes': [Average(word='good', mean=2.0, count=2)]}
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmctl.evaluate.attribution.explain import Explanation
from llmctl.evaluate.attribution.inputs import TEXT

RARE = 2
"""Minimum number of occurrences of an averaged word. A single occurrence is weak evidence about a class."""


class Average(NamedTuple):
    """Store the mean attribution of a word, and the number of its occurrences."""

    word: str
    mean: float
    count: int


def averages(found: Sequence[Explanation], rare: int = RARE) -> dict[str, list[Average]]:
    """Return the mean attribution of each word by target, the largest mean first.

    Words with fewer than `rare` occurrences in the texts of a target are left out.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        for word, value in words(one):
            values[one.target][word].append(value)
    out = {}
    for target, own in sorted(values.items()):
        means = [Average(word, float(np.mean(v)), len(v)) for word, v in own.items() if len(v) >= rare]
        if means:
            out[target] = sorted(means, key=lambda a: (-a.mean, a.word))
    return out


def words(one: Explanation) -> list[tuple[str, float]]:
    """Return the words of a text with their attributions, without white space around them."""
    found: list[tuple[str, float]] = []
    before = (-1, 0)
    for piece, value in one.units:
        if piece.kind != TEXT or not piece.text:
            continue
        if found and before == (piece.part, piece.first) and _joins(found[-1][0][-1:]) and _joins(piece.text[0]):
            found[-1] = found[-1][0] + piece.text, found[-1][1] + value
        else:
            found.append((piece.text, value))
        before = piece.part, piece.last
    return [(text.strip(), value) for text, value in found if text.strip()]


def _joins(character: str) -> bool:
    return character.isdigit() or character.lower() != character.upper()


def extremes(means: Sequence[Average], top: int) -> tuple[list[Average], list[Average]]:
    """Return at most `top` words with the largest positive means, and those with the largest negative means."""
    return [a for a in means if a.mean > 0][:top], [a for a in reversed(means) if a.mean < 0][:top]
