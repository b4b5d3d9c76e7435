"""Examples: rows in our columns, without duplicates, split by what they say.

A text's split is a function of the text alone, never of its place, the filters or the other texts: the review that
a classifier is tested on was in no stage's training data, whatever each stage filtered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast, get_args, overload

import numpy as np

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.data.columns import View
from llmctl.data.config import DataConfig, Split
from llmctl.data.dedup import BLANK, FILTERED, KEPT, RANGE, Scan, scan
from llmctl.data.sources.base import Chain, Row, Source

Range = tuple[int, int, int]
"""Number of a source, first row, one beyond the last."""


@dataclass(frozen=True)
class Examples:
    """Rows of one split, read when asked for: dicts of text columns and, where there are labels, `label`.

    Also `tokens`, `tags` (lists of text) and `answers` (a list of (text, first character)) where the data has them.
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
    chars: np.ndarray
    """Characters of each row's first text."""
    labels: np.ndarray | None
    """Class indices (int32) or numbers (float32)."""
    part: np.ndarray
    """Which source of a mixture each row is from."""
    classes: tuple[str, ...]
    """Label values (of texts or of words) by class index; empty for numbers and where there are no labels."""

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
        arrays = ("index", "fraction", "digests", "chars", "labels", "part")
        held = {name: getattr(self, name) for name in arrays}
        return dataclasses.replace(self, **{k: None if v is None else v[which] for k, v in held.items()})

    def sample(self, n: int) -> Examples:
        """At most n rows, chosen by their hash: representative of a sorted file, and the same in every run."""
        return self if n >= len(self) else self.take(np.sort(np.argsort(self.fraction, kind="stable")[:n]))

    def within(self, chars: int) -> Examples:
        """As `sample`: as many rows as have at most so many characters together, but one at least."""
        order = np.argsort(self.fraction, kind="stable")
        n = int(np.searchsorted(np.cumsum(self.chars[order]), chars, "right"))
        return self.sample(max(n, 1))

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


def load(cfg: DataConfig, scans: Callable[[Iterable[Range]], Iterable[Scan]] | None = None) -> Splits:
    """Reads every row once: filters, maps labels, drops blanks and duplicates, splits.

    Args:
        cfg: the data.
        scans: scans ranges of rows (source, first, last), in order; say, in several processes.

    Raises:
        RequestError: missing files or columns, rows that cannot be read, labels outside the classes, no text at all.
    """
    views = [View(part) for part in cfg.parts()]
    if any(v.columns != views[0].columns for v in views):
        listed = "; ".join(", ".join(v.columns) for v in views)
        raise RequestError(f"the sources of a mixture must have the same columns, these have {listed}")
    ranges = [(p, at, min(at + RANGE, len(v))) for p, v in enumerate(views) for at in range(0, len(v), RANGE)]
    found = list(scans(ranges) if scans else (scan(cfg, views[p], first, last) for p, first, last in ranges))
    state_R = np.concatenate([np.zeros(0, np.uint8), *(f.state for f in found)])
    index_N = np.flatnonzero(state_R == KEPT)
    filtered, blank = (int((state_R == dropped).sum()) for dropped in (FILTERED, BLANK))
    if not len(index_N):
        raise RequestError(
            f"{_named(cfg)}: no text in it ({len(state_R)} rows, {filtered} filtered out, {blank} blank)"
        )
    labels = [label for f in found for label in f.labels]
    tags = sorted(set().union(*(f.tags for f in found)))
    if labels and tags:
        raise RequestError(f"{_named(cfg)}: has a label a row and a tag a word; choose one kind with data.columns")
    classes, labels_N = _classes(cfg, labels or tags) if labels or tags else ((), None)
    labels_N = None if tags else labels_N
    ends = np.cumsum([len(v) for v in views])
    everything = Examples(
        source=Chain(views),
        columns=views[0].columns,
        index=index_N,
        fraction=np.concatenate([f.fraction for f in found]),
        digests=np.concatenate([f.digest for f in found]),
        chars=np.concatenate([f.chars for f in found]),
        labels=labels_N,
        part=np.searchsorted(ends, index_N, "right").astype(np.int32),
        classes=classes,
    )
    if cfg.dedup:  # the first of its kind stays
        first = np.unique(np.concatenate([f.key for f in found]), return_index=True)[1]
        everything = everything.take(np.sort(first))
    f_N = everything.fraction
    # test comes first, so that another validation fraction leaves it as it is
    of_N = np.where(f_N < cfg.test, 2, np.where(f_N < cfg.test + cfg.validation, 1, 0))
    split = {name: everything.take(np.flatnonzero(of_N == k)) for k, name in enumerate(get_args(Split))}
    return Splits(cfg, split, len(state_R), filtered, blank, len(index_N) - len(everything))


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
