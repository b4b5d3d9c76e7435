"""Hash the texts of rows, for deduplication and splitting.

The text of a row is hashed to a number in [0, 1), which determines the row's split. This number depends only on the
text, not on the position of the row, the filters or other rows. Several processes can therefore hash different ranges
of rows.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.columns import View
from llmctl.data.config import DataConfig
from llmctl.data.label_values import Label, Labels, Unlabeled, plain

KEPT, FILTERED, BLANK, UNLABELED = 0, 1, 2, 3
RANGE = 8192
"""Number of rows that one call of `scan` reads."""

_TAG = re.compile(r"<[^<>]{1,80}>")
_NOT_CONTENT = bytes(set(range(128)) - set((string.ascii_letters + string.digits).encode()))


def normalize(text: str) -> str:
    """Normalize a text for the comparison of duplicates: NFKC, case folding, and one space per run of white space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def fraction(text: str) -> float:
    """Hash a text to a number in [0, 1), which determines the text's split (train, validation or test).

    The number is computed from the SHA-256 of the text's letters and digits. Tags, punctuation, case and white space
    are ignored. Light cleaning (`data.replace`) therefore does not move a text to another split.
    """
    bare = normalize(_TAG.sub(" ", text) if "<" in text else text).encode()
    content = bare.translate(None, _NOT_CONTENT) or bare
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Scan:
    """Store the text hashes and labels of R consecutive rows of a source.

    `state` has one entry per row. `tags` has one entry per distinct label of words. The other fields have one entry
    per row with the state KEPT.
    """

    state: np.ndarray
    """State of each row, uint8 [R]: KEPT, FILTERED (removed by `data.filter`), BLANK (no text) or UNLABELED."""
    fraction: np.ndarray
    """Hash of each row's first text as a number in [0, 1), float64. The hash determines the row's split."""
    key: np.ndarray
    """Hash of each row's normalized texts: the first 16 bytes of SHA-256. Rows with equal keys are duplicates."""
    digest: np.ndarray
    """Hash of each row's exact texts: the first 16 bytes of SHA-256."""
    chars: np.ndarray
    """Length of each row's first text in characters, int64."""
    labels: list[Label]
    """Label of each row with the state KEPT, as spelled in the data; empty if rows have no labels."""
    tags: dict[str, str]
    """First row in which each label of a word occurs, {label: location of the row}; empty if words have no labels."""


def scan(cfg: DataConfig, view: View, first: int, last: int) -> Scan:
    """Read the rows `first` to `last` - 1 of a source, hash their texts, and check their labels.

    Raises:
        RequestError: If a row cannot be read, or if its label is missing, invalid or not among the classes.
    """
    of_rows, of_words = (Labels(cfg, view.source_name(ours)) for ours in ("label", "tags"))
    state = np.full(last - first, KEPT, np.uint8)
    fractions, keys, digests, chars, labels = [], [], [], [], []
    tags: dict[str, str] = {}
    for i in range(first, last):
        try:
            found = view.read(i)
        except Unlabeled:
            if cfg.unlabeled == "refuse":
                raise
            state[i - first] = UNLABELED
            continue
        if found is None:
            state[i - first] = FILTERED
            continue
        row, made = found
        values = view.compared_texts(row)
        if not any(v.strip() for v in values):
            state[i - first] = BLANK
            continue
        try:
            label = [of_rows.label(row["label"])] if "label" in row else []
            words = [plain(tag) for tag in row.get("tags", ()) if of_words.of_class(tag)]
        except RequestError as error:
            if isinstance(error, Unlabeled) and cfg.unlabeled == "drop":
                state[i - first] = UNLABELED
                continue
            raise type(error)(f"{view.where(i)}: {error}") from None
        labels += label
        tags |= {tag: view.where(i) for tag in set(words) - tags.keys()}
        # Pairs and prompts are split by their first text, so all answers to a question are in one split.
        fractions.append(fraction(values[0] if values[0].strip() else "\0".join(values)))
        keys.append(_digest(map(normalize, values)))
        digests.append(_digest([*values, *(text for text in made.values() if isinstance(text, str))]))
        chars.append(len(values[0]))
    # S16 compares all 16 bytes: NumPy strips trailing zero bytes and pads with zeros again, which restores the value.
    key, digest = (np.frombuffer(b"".join(d), "S16") for d in (keys, digests))
    return Scan(state, np.array(fractions), key, digest, np.array(chars, np.int64), labels, tags)


def _digest(texts: Iterable[str]) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()[:16]
