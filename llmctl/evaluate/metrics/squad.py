"""Answers compared as SQuAD compares them: exact match and F1 of words, against the best of the accepted answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROPPED = str.maketrans("", "", string.punctuation)


def normal(answer: str) -> str:
    """Lower case, without punctuation and articles, words a space apart (arXiv:1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_DROPPED)).split())


def exact(said: str, truth: Sequence[str]) -> float:
    """1 where the answer is one of the accepted ones; none accepted means that no answer ("") is right."""
    return float(any(normal(said) == normal(t) for t in truth or [""]))


def f1(said: str, truth: Sequence[str]) -> float:
    """Largest F1 of the words of the answer and of an accepted one; without words it is 1 or 0 as they agree."""
    return max(_overlap(normal(said).split(), normal(t).split()) for t in truth or [""])


def _overlap(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    same = (Counter(a) & Counter(b)).total()
    return 2 * same / (len(a) + len(b))
