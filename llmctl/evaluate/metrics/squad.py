"""Compute the SQuAD metrics, exact match and word F1: each is the maximum over the accepted answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROPPED = str.maketrans("", "", string.punctuation)


def normal(answer: str) -> str:
    """Normalize an answer as SQuAD does (Rajpurkar et al., 2016, arXiv:1606.05250).

    The result is in lower case, with single spaces, and without punctuation and articles.
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_DROPPED)).split())


def exact(predicted: str, truth: Sequence[str]) -> float:
    """Return 1.0 if the answer `predicted` equals an accepted answer after normalization, else 0.0.

    If `truth` is empty, only the empty answer is correct.
    """
    return float(any(normal(predicted) == normal(t) for t in truth or [""]))


def f1(predicted: str, truth: Sequence[str]) -> float:
    """Return the largest word F1 of the answer `predicted` with an accepted answer, after normalization.

    If `truth` is empty, only the empty answer is accepted. The F1 of two answers without words is 1. If only one of two
    answers has words, the F1 is 0.
    """
    return max(_overlap(normal(predicted).split(), normal(t).split()) for t in truth or [""])


def _overlap(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    same = (Counter(a) & Counter(b)).total()
    return 2 * same / (len(a) + len(b))


def mean_exact(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the fraction of predictions that equal their reference after normalization."""
    return sum(exact(p, [t]) for t, p in zip(truth, predicted, strict=True)) / len(truth)


def mean_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the mean word F1 of predictions with their references, after normalization."""
    return sum(f1(p, [t]) for t, p in zip(truth, predicted, strict=True)) / len(truth)
