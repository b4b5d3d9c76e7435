"""Compute entity-level metrics of labelled words: precision, recall and F1, as the script conlleval computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Entity = tuple[str, int, int]
"""Entity: (type, index of the first word, index of the last word)."""


SCHEMES = ("BIES", "BILU", "BMES", "BMEW")
"""Prefixes of entity tags in each supported scheme, without O. A prefix is the first letter of a tag, such as B in
B-PER. The schemes: IOBES (which includes IOB2), BILOU, BMES, BMEWO."""
LETTER = {"M": "I", "L": "E", "U": "S", "W": "S"}
"""Map from the prefixes of other schemes to the prefixes of IOBES: M (middle) to I, L (last) to E, U (unit) and W
(whole) to S."""
UNTYPED = "entity"
"""Entity type for tags without a type, such as the tags of word segmentation."""


def is_scheme(tags: Iterable[str]) -> bool:
    """Return True if the labels `tags` are entity tags.

    Each tag must be "O", or have the form PREFIX-TYPE such as "B-PER". All prefixes must belong to one scheme in
    `SCHEMES`. At least one tag must differ from "O". Tags without a type are accepted if there are at least three
    different tags, including "B".

    >>> is_scheme(["B-PER", "L-PER", "U-PER"]), is_scheme(["B", "M", "E", "S"]), is_scheme(["B", "E"])
    (True, True, False)
    """
    tags = set(tags)
    marked = tags - {"O"}
    if not any({tag[:1] for tag in marked} <= set(letters) for letters in SCHEMES):
        return False
    typed = all(t[1:2] == "-" and t[2:] for t in marked)
    return bool(marked) and (typed or (all(len(t) == 1 for t in marked) and "B" in tags and len(tags) >= 3))


def parsed(tag: str) -> tuple[str, str]:
    """Return the IOBES prefix (one letter of "OBIES") and the entity type of a tag in any scheme. The type of "O" is
    ""."""
    letter, _, kind = tag.partition("-")
    return LETTER.get(letter, letter), "" if tag == "O" else kind or UNTYPED


def marks(labels: Sequence[str]) -> np.ndarray | None:
    """Convert entity tags to numbers.

    Returns:
        int32 [C, 2], one row per label: the index of the label's prefix in "OBIES", and the number of the entity type.
        None if the labels are not entity tags.
    """
    if not is_scheme(labels):
        return None
    found = [parsed(tag) for tag in labels]
    kinds = sorted({kind for _, kind in found})
    return np.array([("OBIES".index(letter), kinds.index(kind)) for letter, kind in found], np.int32)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the set of entities (type, first word, last word) in the tags of one text.

    An entity begins at B- and S-. It also begins at I- and E-, if the previous tag is not inside an entity of the same
    type. Such a previous tag is O, ends an entity (E-, S-), or has another type. For example, "I-PER" after "O" begins
    an entity. An entity ends before the next word that begins an entity or has the tag O. This is the lenient
    interpretation of conlleval and of seqeval's default. Tags of other schemes are converted to IOBES: L- to E-, M- to
    I-, U- and W- to S-.

    >>> sorted(entities(["B-PER", "L-PER", "O", "U-LOC", "B-ORG", "M-ORG", "E-ORG"]))
    [('LOC', 3, 3), ('ORG', 4, 6), ('PER', 0, 1)]
    """
    found: set[Entity] = set()
    begun, last = -1, ("O", "")
    for n, tag in enumerate([*tags, "O"]):
        letter, kind = parsed(tag)
        begins = letter in ("B", "S") or (letter != "O" and (last[0] in ("O", "E", "S") or kind != last[1]))
        if begun >= 0 and (begins or letter == "O"):
            found.add((last[1], begun, n - 1))
            begun = -1
        if begins:
            begun = n
        last = letter, kind
    return found


def scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Compute precision, recall and F1 of entities, pooled over all texts and per type.

    An entity is correct if its type and both boundaries match.

    Args:
        truth: True tag of each word, per text.
        predicted: Predicted tag of each word, per text.

    Returns:
        entity_precision, entity_recall, entity_f1: Metrics over all types.
        entities: Number of true entities.
        per_entity: Precision, recall and F1 of each type.
    """
    right, there, named = Counter(), Counter(), Counter()
    for true_tags, predicted_tags in zip(truth, predicted, strict=True):
        a, b = entities(true_tags), entities(predicted_tags)
        for counter, some in ((there, a), (named, b), (right, a & b)):
            counter.update(kind for kind, _, _ in some)
    whole = _f1(right.total(), named.total(), there.total())
    each = {k: _f1(right[k], named[k], there[k]) | {"support": there[k]} for k in sorted({*there, *named})}
    pooled = {f"entity_{k}": v for k, v in whole.items()}
    return pooled | {"entities": there.total(), "per_entity": each}


def counts(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Return a pair (numerator, denominator) per text and metric: {metric: [N, 2]}.

    The sums over texts give the metrics of `scores`.
    """
    pairs = [(entities(t), entities(p)) for t, p in zip(truth, predicted, strict=True)]
    right_N, there_N, named_N = np.array([(len(a & b), len(a), len(b)) for a, b in pairs]).reshape(-1, 3).T
    parts = {
        "entity_precision": (right_N, named_N),
        "entity_recall": (right_N, there_N),
        "entity_f1": (2 * right_N, named_N + there_N),
    }
    return {name: np.stack(part, axis=1) for name, part in parts.items()}


def _f1(right: int, named: int, there: int) -> dict[str, float]:
    """Compute precision, recall and F1 from counts of correct, predicted and true entities; each is 0 if undefined."""
    return {
        "precision": right / named if named else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (named + there) if right else 0.0,
    }
