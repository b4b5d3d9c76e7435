"""Scan rows for deduplication and splitting. Ranges of rows are scanned independently, in any process.

A text's value in [0, 1) decides its split. It depends on the text alone, not on its position, the filters or other
texts.
"""

from __future__ import annotations

import hashlib
import math
import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.data.columns import View, plain
from llmctl.data.config import DataConfig

Label = str | float | tuple[str, ...]
"""Class, number or set of classes."""
KEPT, FILTERED, BLANK = 0, 1, 2
RANGE = 8192
"""Number of rows scanned at a time."""

_TAG = re.compile(r"<[^<>]{1,80}>")
_NOT_CONTENT = bytes(set(range(128)) - set((string.ascii_letters + string.digits).encode()))


def normal(text: str) -> str:
    """Normalize a text for the duplicate test: NFKC, case folding, and one space per run of white space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def fraction(text: str) -> float:
    """Hash a text to [0, 1) with SHA-256 over its letters and digits. Tags, punctuation, case and space are ignored.

    This is coarser than `normal`, so light cleaning (`replace`) does not move a text to another split.
    """
    bare = normal(_TAG.sub(" ", text) if "<" in text else text).encode()
    content = bare.translate(None, _NOT_CONTENT) or bare
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Scan:
    """Scan result of a range of rows. `state` has an entry per row, the other fields one per kept row."""

    state: np.ndarray
    """KEPT, FILTERED or BLANK."""
    fraction: np.ndarray
    """Hash of each text in [0, 1), which decides its split."""
    key: np.ndarray
    """First 16 bytes of the SHA-256 of the normalized texts. Equal keys mean duplicates."""
    digest: np.ndarray
    """First 16 bytes of the SHA-256 of the exact texts."""
    chars: np.ndarray
    """Length of the first text in characters."""
    labels: list[Label]
    """Label values; empty if rows have no labels."""
    tags: set[str]
    """Distinct labels of words; empty if words have none."""


def scan(cfg: DataConfig, view: View, first: int, last: int) -> Scan:
    """Scan the rows first..last - 1 of a source.

    Raises:
      RequestError: a row cannot be read, or its label is not among the classes.
    """
    allowed = {c: k for k, c in enumerate(cfg.classes)}
    state = np.full(last - first, KEPT, np.uint8)
    fractions, keys, digests, chars, labels = [], [], [], [], []
    tags: set[str] = set()
    for i in range(first, last):
        row = view.read(i)
        if row is None:
            state[i - first] = FILTERED
            continue
        values = [row[c] for c in view.texts]
        if not any(v.strip() for v in values):
            state[i - first] = BLANK
            continue
        if "label" in row:
            label = _set if cfg.label_type == "set" else _label
            labels.append(label(cfg, row["label"], allowed, view, i))
        for tag in set(row.get("tags", ())) - tags:
            tags.add(str(_label(cfg, tag, allowed, view, i)))
        # Pairs and prompts are split by their first text, so all answers to a question are in one split.
        fractions.append(fraction(values[0] if values[0].strip() else "\0".join(values)))
        keys.append(_digest(map(normal, values)))
        digests.append(_digest(values))
        chars.append(len(values[0]))
    # S16 compares all 16 bytes: NumPy strips trailing zero bytes and pads with zeros again, which restores the value.
    key, digest = (np.frombuffer(b"".join(d), "S16") for d in (keys, digests))
    return Scan(state, np.array(fractions), key, digest, np.array(chars, np.int64), labels, tags)


def _digest(texts: Iterable[str]) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()[:16]


def _set(cfg: DataConfig, value: Any, allowed: dict[str, int], view: View, i: int) -> tuple[str, ...]:
    if isinstance(value, str) and cfg.label_separator:
        value = [part for given in value.split(cfg.label_separator) if (part := given.strip())]
    if not isinstance(value, list):
        advice = "set data.label_separator" if isinstance(value, str) else "[] is the empty set"
        raise RequestError(f"{view.where(i)}: label {value!r} is no list of labels; {advice}")
    return tuple(dict.fromkeys(str(_label(cfg, v, allowed, view, i)) for v in value))


def _label(cfg: DataConfig, value: Any, allowed: dict[str, int], view: View, i: int) -> str | float:
    if value is None or value == "":
        raise RequestError(f"{view.where(i)}: the label is empty")
    if cfg.label_type == "number":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RequestError(f"{view.where(i)}: label {value!r} is not a number")
        return number
    label = plain(value)
    if allowed and label not in allowed:
        raise RequestError(
            f"{view.where(i)}: label {label!r} is not among data.classes ({', '.join(allowed)})"
            f"{hint(label, list(allowed))}"
        )
    return label
