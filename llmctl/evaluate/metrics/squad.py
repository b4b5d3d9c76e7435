"""SQuAD metrics: exact match and word F1, each the maximum over the accepted answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROPPED = str.maketrans("", "", string.punctuation)


def normal(answer: str) -> str:
    """Normalize an answer: lower case, no punctuation, no articles, single spaces.

    (Rajpurkar et al., 2016, arXiv:1606.05250)
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_DROPPED)).split())


def exact(said: str, truth: Sequence[str]) -> float:
    """Return 1 if the answer equals an accepted one, else 0.

    Without accepted answers, only the empty answer is correct.
    """
    return float(any(normal(said) == normal(t) for t in truth or [""]))


def f1(said: str, truth: Sequence[str]) -> float:
    """Return the largest word F1 with an accepted answer. If either has no words, F1 is 1 if both are empty, else 0."""
    return max(_overlap(normal(said).split(), normal(t).split()) for t in truth or [""])


def _overlap(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    same = (Counter(a) & Counter(b)).total()
    return 2 * same / (len(a) + len(b))
