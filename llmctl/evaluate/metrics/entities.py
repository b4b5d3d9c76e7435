"""Entities in tagged words: what begins and ends where, and how many of them were found (as conlleval counts them)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Entity = tuple[str, int, int]
"""Type, first word, last word."""


def is_scheme(tags: Iterable[str]) -> bool:
    """Whether labels mark entities: "O", or a letter of BIOES, a dash and a type; and some do."""
    tags = set(tags)
    return bool(tags - {"O"}) and all(t == "O" or (t[:1] in "BIES" and t[1:2] == "-" and t[2:]) for t in tags)


def marks(labels: Sequence[str]) -> np.ndarray | None:
    """Letter (its place in "OBIES") and number of the type of each label, int32 [C, 2]; None where none are marked."""
    if not is_scheme(labels):
        return None
    kinds = sorted({tag[2:] for tag in labels})
    return np.array([("OBIES".index(tag[0]), kinds.index(tag[2:])) for tag in labels], np.int32)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of one text's tags.

    One begins at B- and S-, at I- and E- after O, after the end of another (E-, S-) or after another type (so "I-PER"
    after "O" begins one), and goes on to the word before the next beginning or O. This is the lenient reading of
    conlleval and of seqeval's default.
    """
    found: set[Entity] = set()
    begun, last = -1, ("O", "")
    for n, tag in enumerate([*tags, "O"]):
        letter, _, kind = tag.partition("-")
        begins = letter in ("B", "S") or (letter != "O" and (last[0] in ("O", "E", "S") or kind != last[1]))
        if begun >= 0 and (begins or letter == "O"):
            found.add((last[1], begun, n - 1))
            begun = -1
        if begins:
            begun = n
        last = letter, kind
    return found


def scores(truth: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall and F1 of entities, exact in type and both ends, pooled over all texts; and of each type."""
    right, there, named = Counter(), Counter(), Counter()
    for true_tags, said_tags in zip(truth, said, strict=True):
        a, b = entities(true_tags), entities(said_tags)
        for counter, some in ((there, a), (named, b), (right, a & b)):
            counter.update(kind for kind, _, _ in some)
    whole = _f1(right.total(), named.total(), there.total())
    each = {k: _f1(right[k], named[k], there[k]) | {"support": there[k]} for k in sorted({*there, *named})}
    pooled = {f"entity_{k}": v for k, v in whole.items()}
    return pooled | {"entities": there.total(), "per_entity": each}


def _f1(right: int, named: int, there: int) -> dict[str, float]:
    """0 where nothing is there or nothing was named."""
    return {
        "precision": right / named if named else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (named + there) if right else 0.0,
    }
