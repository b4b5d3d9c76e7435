"""Examples: rows in our columns, without duplicates, split by what they say.

A text's split is a function of the text alone, never of its place, the filters or the other texts: the review that
a classifier is tested on was in no stage's training data, whatever each stage filtered.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast, get_args, overload

import numpy as np

from llmctl.config import hint
from llmctl.data import DataConfig, Split
from llmctl.data.source import Chain, Row, Source
from llmctl.data.views import View, plain
from llmctl.errors import RequestError

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
class Examples:
    """Rows of one split, read when asked for: dicts of text columns and, where there are labels, `label`.

    `label` is the class index (int) or the number (float). Arrays are [N], one entry a row.
    """

    source: Source
    columns: tuple[str, ...]
    index: np.ndarray
    """Rows of `source`, ascending unless sampled."""
    fraction: np.ndarray
    """Where each text falls in [0, 1)."""
    digests: np.ndarray
    """16 bytes of each row's exact text."""
    labels: np.ndarray | None
    """Class indices (int32) or numbers (float32)."""
    part: np.ndarray
    """Which source of a mixture each row is from."""
    classes: tuple[str, ...]
    """Label values by class index; empty for numbers and where there are no labels."""

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Examples: ...
    def __getitem__(self, i: int | slice) -> Row | Examples:
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        row = self.source[int(self.index[i])]
        return row if self.labels is None else {**row, "label": self.labels[i].item()}

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def take(self, which: np.ndarray) -> Examples:
        """These rows, in this order."""
        return Examples(
            self.source, self.columns, self.index[which], self.fraction[which], self.digests[which],
            None if self.labels is None else self.labels[which], self.part[which], self.classes,
        )  # fmt: skip

    def sample(self, n: int) -> Examples:
        """At most n rows, chosen by their hash: representative of a sorted file, and the same in every run."""
        return self if n >= len(self) else self.take(np.sort(np.argsort(self.fraction, kind="stable")[:n]))

    def parts(self) -> list[tuple[int, Examples]]:
        """(number, rows) of every source of the mixture that has rows here."""
        return [(int(p), self.take(np.flatnonzero(self.part == p))) for p in np.unique(self.part)]

    def texts(self, column: str = "text") -> Iterator[str]:
        """One column.

        Raises:
            RequestError: the data has no such column.
        """
        if column not in self.columns:
            raise RequestError(
                f"the data has no column {column!r}; map one in data.columns (it has: {', '.join(self.columns)})"
            )
        return (self.source[int(i)][column] for i in self.index)

    @property
    def digest(self) -> str:
        """sha256 of all rows' texts, in order."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


@dataclass(frozen=True)
class Splits:
    """The three splits of one DataConfig; `splits["train"]`."""

    config: DataConfig
    examples: dict[str, Examples]
    rows: int
    """Rows the files hold."""
    filtered: int
    """Rows that the filter dropped."""
    blank: int
    """Rows without text, dropped."""
    duplicates: int
    """Rows whose text stood there before, dropped."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Label values by class index."""
        return self.examples["train"].classes

    def __getitem__(self, split: str) -> Examples:
        """The examples of a split.

        Raises:
            RequestError: no such split, or nothing in it.
        """
        if split not in self.examples:
            raise RequestError(
                f"no split {split!r}{hint(split, list(self.examples))} (splits: train, validation, test)"
            )
        if not len(self.examples[split]):
            how = {"train": "too few texts", "validation": f"data.validation = {self.config.validation}",
                   "test": f"data.test = {self.config.test}"}[split]  # fmt: skip
            raise RequestError(f"{_named(self.config)}: the {split} split is empty ({how}, {self.rows} rows)")
        return self.examples[split]


def examples(cfg: DataConfig, split: Split) -> Examples:
    """One split; `load` gives all three for the same work.

    Raises:
        RequestError: as `load`; or the split is empty.
    """
    return load(cfg)[split]


def load(cfg: DataConfig) -> Splits:
    """Reads every row once: filters, maps labels, drops blanks and duplicates, splits.

    Raises:
        RequestError: missing files or columns, rows that cannot be read, labels outside the classes, no text at all.
    """
    views = [View(part) for part in cfg.parts()]
    if any(v.columns != views[0].columns for v in views):
        listed = "; ".join(", ".join(v.columns) for v in views)
        raise RequestError(f"the sources of a mixture must have the same columns, these have {listed}")
    columns = views[0].columns
    texts = [c for c in columns if c != "label"]
    kept, fractions, digests, labels, part_of = [], [], [], [], []
    seen: set[bytes] = set()
    rows = filtered = blank = duplicates = 0
    allowed = {c: k for k, c in enumerate(cfg.classes)}
    for part, view in enumerate(views):
        for i in range(len(view)):
            row = view.read(i)
            if row is None:
                filtered += 1
                continue
            values = [row[c] for c in texts]
            if not any(v.strip() for v in values):
                blank += 1
                continue
            if cfg.dedup:
                key = hashlib.sha256("\0".join(map(normal, values)).encode("utf-8", "surrogatepass")).digest()[:16]
                if key in seen:
                    duplicates += 1
                    continue
                seen.add(key)
            if "label" in columns:
                labels.append(_label(cfg, row["label"], allowed, view, i))
            kept.append(rows + i)
            part_of.append(part)
            # pairs and prompts split by their first text: one question's answers stay together
            fractions.append(fraction(values[0] if values[0].strip() else "\0".join(values)))
            digests.append(hashlib.sha256("\0".join(values).encode("utf-8", "surrogatepass")).digest()[:16])
        rows += len(view)
    if not kept:
        raise RequestError(f"{_named(cfg)}: no text in it ({rows} rows, {filtered} filtered out, {blank} blank)")
    classes, labels_N = _classes(cfg, labels) if labels else ((), None)
    everything = Examples(
        Chain(views), columns, np.array(kept, np.int64), np.array(fractions),
        np.frombuffer(b"".join(digests), "V16"), labels_N, np.array(part_of, np.int32), classes,
    )  # fmt: skip
    f_N = everything.fraction
    # test comes first, so that another validation fraction leaves it as it is
    of_N = np.where(f_N < cfg.test, 2, np.where(f_N < cfg.test + cfg.validation, 1, 0))
    split = {name: everything.take(np.flatnonzero(of_N == k)) for k, name in enumerate(get_args(Split))}
    return Splits(cfg, split, rows, filtered, blank, duplicates)


def _label(cfg: DataConfig, value: Any, allowed: dict[str, int], view: View, i: int) -> str | float:
    if value is None or value == "":
        raise RequestError(f"{view.where(i)}: the label is empty")
    if cfg.label_type == "number":
        try:
            return float(value)
        except (TypeError, ValueError):
            raise RequestError(f"{view.where(i)}: label {value!r} is not a number") from None
    label = plain(value)
    if allowed and label not in allowed:
        raise RequestError(
            f"{view.where(i)}: label {label!r} is not among data.classes ({', '.join(allowed)})"
            f"{hint(label, list(allowed))}"
        )
    return label


def _classes(cfg: DataConfig, labels: list[str | float]) -> tuple[tuple[str, ...], np.ndarray]:
    if cfg.label_type == "number":
        return (), np.array(labels, np.float32)
    named = cast(list[str], labels)
    found = set(named)
    numeric = all(re.fullmatch(r"-?\d+", c) for c in found)
    classes = tuple(cfg.classes) or tuple(sorted(found, key=(lambda c: (int(c), c)) if numeric else None))
    if len(classes) > 1000:
        raise RequestError(f'{_named(cfg)}: {len(classes)} different labels; numbers? (data.label_type = "number")')
    number = {c: k for k, c in enumerate(classes)}
    return classes, np.array([number[c] for c in named], np.int32)


def _named(cfg: DataConfig) -> str:
    return ", ".join(p.title for p in cfg.parts())
