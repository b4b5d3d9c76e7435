"""Scanning: what is kept of each row, and where its text falls; ranges of rows independently, in any process.

A text's place in [0, 1) is a function of the text alone, never of its position, the filters or the other texts.
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

KEPT, FILTERED, BLANK = 0, 1, 2
RANGE = 8192
"""Rows that are scanned at a time."""

_TAG = re.compile(r"<[^<>]{1,80}>")
_NOT_CONTENT = bytes(set(range(128)) - set((string.ascii_letters + string.digits).encode()))


def normal(text: str) -> str:
    """The form in which two texts are duplicates: NFKC, case folded, runs of white space as one space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def fraction(text: str) -> float:
    """Where in [0, 1) a text falls: sha256 of its letters and digits (tags, punctuation, case and space left out).

    Coarser than `normal`, so that light cleaning (`replace`) does not move a text into another split.
    """
    bare = normal(_TAG.sub(" ", text) if "<" in text else text).encode()
    content = bare.translate(None, _NOT_CONTENT) or bare
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Scan:
    """What is known of a range of rows; `state` is of every row, the other fields of the kept ones."""

    state: np.ndarray
    """KEPT, FILTERED or BLANK."""
    fraction: np.ndarray
    """Where each text falls in [0, 1)."""
    key: np.ndarray
    """16 bytes of the form in which texts are duplicates."""
    digest: np.ndarray
    """16 bytes of the exact text."""
    chars: np.ndarray
    """Characters of the first text."""
    labels: list[str | float]
    """Label values; empty where there are no labels."""
    tags: set[str]
    """Labels of words; empty where words have none."""


def scan(cfg: DataConfig, view: View, first: int, last: int) -> Scan:
    """Rows first..last - 1 of a source.

    Raises:
        RequestError: a row that cannot be read, a label outside the classes.
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
            labels.append(_label(cfg, row["label"], allowed, view, i))
        for tag in set(row.get("tags", ())) - tags:
            tags.add(str(_label(cfg, tag, allowed, view, i)))
        # pairs and prompts split by their first text: one question's answers stay together
        fractions.append(fraction(values[0] if values[0].strip() else "\0".join(values)))
        keys.append(_digest(map(normal, values)))
        digests.append(_digest(values))
        chars.append(len(values[0]))
    # S16 compares all 16 bytes: short values are padded with zeros, which is what they had there
    key, digest = (np.frombuffer(b"".join(d), "S16") for d in (keys, digests))
    return Scan(state, np.array(fractions), key, digest, np.array(chars, np.int64), labels, tags)


def _digest(texts: Iterable[str]) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()[:16]


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
