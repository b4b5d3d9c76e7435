"""Read the rows that a data config describes, remove duplicates, and split the remaining rows into train, validation
and test.

The split of a row depends only on its text, not on its position, the filters or other rows. A text in the test split of
one stage is therefore never in another stage's training data. This also holds if the stages have different filters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args, overload

import numpy as np

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.data import class_indices, columns, label_values
from llmctl.data.config import DataConfig, Split
from llmctl.data.dedup import BLANK, FILTERED, KEPT, RANGE, UNLABELED, Scan, scan
from llmctl.data.source import Chain, Row, Source

Range = tuple[int, int, int]
"""Range of rows: (index of the source, first row, last row + 1)."""


@dataclass(frozen=True)
class Examples:
    """Give access to the N rows of one split (train, validation or test). A row is a dict {column: value}, which is
    read at each access. Columns have llmctl's own names.

    A row has the text columns of the data. If the data is labeled, a row also has `label`. A label is a class index
    (int), a number (float), or a set of classes as C zeros and ones. If the data has the columns `tokens` and `tags`
    (lists of texts) or `answers`, a row has these columns too. An answer is a pair (text, index of its first
    character). Conversations have only `messages` and `tools` (see `llmctl.data.chats`).

    The array fields have the shape [N], with one entry per row.
    """

    source: Source
    columns: tuple[str, ...]
    index: np.ndarray
    """Row numbers in `source`, ascending."""
    fraction: np.ndarray
    """Hash of each row's first text as a number in [0, 1), float64. The hash determines the row's split."""
    digests: np.ndarray
    """Hash of each row's exact texts: the first 16 bytes of SHA-256."""
    chars: np.ndarray
    """Length of each row's first text in characters."""
    labels: np.ndarray | None
    """Label of each row: class indices (int32 [N]), numbers (float32 [N]), or sets of classes, 0 or 1 per class (uint8
    [N, C]). None if rows have no labels, or if each word has a label."""
    part: np.ndarray
    """Index of each row's source in the mixture."""
    classes: tuple[str, ...]
    """Class names in the order of class indices. The classes are those of rows or, if each word has a label, those of
    words. Empty if there are no classes."""
    class_of: Mapping[str, str] = field(default_factory=dict)
    """Map from the spelling of a label in the data to its class name."""

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
        if "tags" in row and self.class_of:
            row = {**row, "tags": [self.class_of[label_values.plain(tag)] for tag in row["tags"]]}
        return row if self.labels is None else {**row, "label": self.labels[i].tolist()}

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def take(self, which: np.ndarray) -> Examples:
        """Return the rows with the indices `which`, in this order."""
        arrays = ("index", "fraction", "digests", "chars", "labels", "part")
        held = {name: getattr(self, name) for name in arrays}
        return dataclasses.replace(self, **{k: None if v is None else v[which] for k, v in held.items()})

    def few_shot(self, per_class: int, seed: int) -> Examples:
        """Return a subset with `per_class` rows of each class.

        The rows stay in order. The choice of rows depends only on the texts and the seed.

        Raises:
            RequestError: If the labels are not classes, or if a class has fewer rows.
        """
        if self.labels is None or not self.classes or self.labels.ndim > 1:
            raise RequestError("data.examples_per_class: needs data with one class per row")
        order_N = np.argsort([hashlib.sha256(b"%d " % seed + digest).digest() for digest in self.digests.tolist()])
        chosen = []
        for number, name in enumerate(self.classes):
            own = order_N[self.labels[order_N] == number]
            if len(own) < per_class:
                raise RequestError(
                    f"data.examples_per_class = {per_class}: the train split has {len(own)} examples of class {name!r}"
                )
            chosen.append(own[:per_class])
        return self.take(np.sort(np.concatenate(chosen)))

    def sample(self, n: int) -> Examples:
        """Return a subset of at most n rows, selected by the hash of their texts.

        The subset is the same in every run, and is representative even if the file is sorted.
        """
        return self if n >= len(self) else self.take(np.sort(np.argsort(self.fraction, kind="stable")[:n]))

    def sample_chars(self, chars: int) -> Examples:
        """Return a pseudo-random subset (see `sample`) of at most `chars` characters in total but at least one row."""
        order = np.argsort(self.fraction, kind="stable")
        n = int(np.searchsorted(np.cumsum(self.chars[order]), chars, "right"))
        return self.sample(max(n, 1))

    def parts(self) -> list[tuple[int, Examples]]:
        """Return (index of the source, rows) for each source of the mixture that has rows in this split."""
        return [(int(p), self.take(np.flatnonzero(self.part == p))) for p in np.unique(self.part)]

    def texts(self, column: str = "text") -> Iterator[str]:
        """Iterate over the texts of one column.

        Raises:
            RequestError: If the data has no such column.
        """
        if column not in self.columns:
            raise RequestError(
                f"the data has no column {column!r}; map one in data.columns (it has: {', '.join(self.columns)})"
            )
        return (self.source[int(i)][column] for i in self.index)

    @property
    def digest(self) -> str:
        """Return the SHA-256 over the texts of all rows in order, as hex digits."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


@dataclass(frozen=True)
class Splits:
    """Store the train, validation and test splits of the data. `splits["train"]` returns the examples of a split."""

    config: DataConfig
    examples: dict[str, Examples]
    rows: int
    """Number of rows in the files, before any row is removed."""
    filtered: int
    """Number of rows that the filter removed."""
    blank: int
    """Number of rows that are removed because they have no text."""
    duplicates: int
    """Number of rows that are removed because an earlier row, or a row of a held-out file, has the same text."""
    unlabeled: int = 0
    """Number of rows without a label, which are removed if `data.unlabeled` is "drop"."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names in the order of class indices."""
        return self.examples["train"].classes

    @property
    def left_out(self) -> dict[str, int]:
        """Return the number of rows that are in no split, by reason."""
        return {
            "duplicates": self.duplicates,
            "filtered": self.filtered,
            "blank": self.blank,
            "unlabeled": self.unlabeled,
        }

    def describe(self) -> str:
        """Return a log line with the number of rows in each split, and the number of removed rows by reason.

        Example:
          >>> empty = Examples(Chain([]), (), *[np.zeros(0)] * 4, None, np.zeros(0), ())
          >>> Splits(DataConfig(), dict.fromkeys(("train", "test"), empty), 5, 2, 0, 3).describe()
          '5 rows: 0 train, 0 test; left out: 3 duplicates, 2 filtered'
        """
        kept = ", ".join(f"{len(examples):,} {name}" for name, examples in self.examples.items())
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out.items() if n)
        return f"{self.rows:,} rows: {kept}" + (f"; left out: {dropped}" if dropped else "")

    def __getitem__(self, split: str) -> Examples:
        """Return the examples of a split.

        Raises:
            RequestError: If there is no such split, or if it is empty.
        """
        if split not in self.examples:
            raise RequestError(
                f"no split {split!r}{hint(split, list(self.examples))} (splits: train, validation, test)"
            )
        if not len(self.examples[split]):
            how = "too few texts" if split == "train" else f"data.{split} = {getattr(self.config, split)}"
            files = any(part.source == "text" and part.documents == "file" for part in self.config.parts())
            raise RequestError(
                f"{self.config.titles}: the {split} split is empty ({how}, {self.rows} rows)"
                + '; data.documents = "paragraph" or "line" makes more rows of a file' * files
            )
        return self.examples[split]


def examples(cfg: DataConfig, split: Split, labels: bool = True, conversations: bool = False) -> Examples:
    """Load the examples of one split. Each call reads all rows of the data. To get several splits, call `load` once.

    Raises:
        RequestError: If the data is missing or invalid (see `load`), or if the split is empty.
    """
    return load(cfg, labels=labels, conversations=conversations)[split]


def load(
    cfg: DataConfig,
    scans: Callable[[Iterable[Range]], Iterable[Scan]] | None = None,
    *,
    labels: bool = True,
    conversations: bool = False,
) -> Splits:
    """Read all rows of the data, and divide them into train, validation and test splits.

    Before the division, rows are filtered, and blank rows and duplicates are removed. Labels are mapped to classes.

    Args:
        cfg: Settings of the data.
        scans: Function that calls `dedup.scan` for ranges of rows and returns the results in order, for example in
            several processes. By default, this process scans all ranges.
        labels: Whether to read labels. If false, rows have no label columns.
        conversations: Whether the rows are conversations, which have only the columns messages and tools.

    Raises:
        RequestError: If files or columns are missing. If rows cannot be read. If a label is not in `data.classes`. If
            there is no text.
    """
    views = columns.views(cfg, labels=labels, conversations=conversations)
    if any(v.columns != views[0].columns for v in views):
        listed = "; ".join(", ".join(v.columns) for v in views)
        what = "sources of a mixture" if cfg.mixture else "files of the splits"
        raise RequestError(f"the {what} must have the same columns, these have {listed}")
    ranges = [(p, at, min(at + RANGE, len(v))) for p, v in enumerate(views) for at in range(0, len(v), RANGE)]
    found = list(scans(ranges) if scans else (scan(cfg, views[p], first, last) for p, first, last in ranges))
    state_R = np.concatenate([np.zeros(0, np.uint8), *(f.state for f in found)])
    index_N = np.flatnonzero(state_R == KEPT)
    filtered, blank, unlabeled = (int((state_R == dropped).sum()) for dropped in (FILTERED, BLANK, UNLABELED))
    if not len(index_N):
        raise RequestError(
            f"{cfg.titles}: no text in it ({len(state_R)} rows, {filtered} filtered out, {blank} blank"
            f"{f', {unlabeled} without a label' * bool(unlabeled)})"
        )
    source = Chain(views)
    declared = [c for v in views for c in v.classes]
    classes, class_of, labels_N = class_indices.of_rows(cfg, found, declared, lambda k: source.where(int(index_N[k])))
    ends = np.cumsum([len(v) for v in views])
    everything = Examples(
        source=source,
        columns=views[0].columns,
        index=index_N,
        fraction=np.concatenate([f.fraction for f in found]),
        digests=np.concatenate([f.digest for f in found]),
        chars=np.concatenate([f.chars for f in found]),
        labels=labels_N,
        part=np.searchsorted(ends, index_N, "right").astype(np.int32),
        classes=classes,
        class_of=class_of,
    )
    own = {name: len(cfg.parts()) + k for k, name in enumerate(cfg.held_out())}
    key_N = np.concatenate([f.key for f in found])
    held_N = np.where(everything.part < len(cfg.parts()), 0, everything.part)
    if cfg.dedup:  # the first of several duplicates stays; rows of held-out files come first
        order_N = np.argsort(-held_N, kind="stable")
        first = np.unique(key_N[order_N], return_index=True)[1]
        everything = everything.take(np.sort(order_N[first]))
    elif own:  # equal texts get the same split by their hash, but not if a split has its own files
        everything = everything.take(np.flatnonzero((held_N > 0) | ~np.isin(key_N, key_N[held_N > 0])))
    f_N, kinds = everything.fraction, get_args(Split)
    test, validation = (0.0 if name in own else getattr(cfg, name) for name in ("test", "validation"))
    # The test split takes the lowest values, so that another validation fraction does not change it.
    of_N = np.where(f_N < test, 2, np.where(f_N < test + validation, 1, 0))
    for name, part in own.items():
        of_N[everything.part == part] = kinds.index(name)
    split = {name: everything.take(np.flatnonzero(of_N == k)) for k, name in enumerate(kinds)}
    if cfg.examples_per_class:
        split["train"] = split["train"].few_shot(cfg.examples_per_class, cfg.examples_seed)
    return Splits(cfg, split, len(state_R), filtered, blank, len(index_N) - len(everything), unlabeled)
