"""Base classes of data sources: sequences of rows that know each row's location in its file, and what opens them.

A source is a sequence of dicts {column: value}, so Grain can read it directly. It also returns the location of each
row, because an error in the data is hard to fix without one.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.class_names import Names
from llmctl.data.config import SourceConfig
from llmctl.data.paths import keep_open, resolve
from llmctl.data.sources import SOURCES

Row = dict[str, Any]


class Source:
    """Represent a dataset with random access to its rows.

    A subclass defines `columns`, `__len__`, `__getitem__` and `where`. `columns` lists the columns that rows may have.
    The rows of JSON lines may differ, so there it lists the columns of the first rows, and `has` searches all.

    Example:
      >>> source = Table("quotes.txt", ("text",), [("To be",), ("or not to be",)], lines=[1, 3])
      >>> source[1], source.where(1)
      ({'text': 'or not to be'}, 'quotes.txt:3')
    """

    columns: tuple[str, ...] = ()
    names: Names = {}
    """Class names of the columns that hold class numbers, if the data declares them."""

    def has(self, column: str) -> bool:
        """Return whether rows may have a column."""
        return column in self.columns

    def where(self, i: int) -> str:
        """Return the location of row i for error messages: the file and the line or row number."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> Row:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


class Chain(Source):
    """Concatenation of sources."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = [s for s in sources if len(s)] or list(sources[:1])
        self.columns = tuple(dict.fromkeys(c for s in sources for c in s.columns))
        self.names = self.sources[0].names if self.sources else {}
        if odd := next((s for s in self.sources if s.names != self.names), None):
            raise RequestError(
                f"{odd.where(0)}: declares other class names than the first file ({dict(odd.names)} and "
                f"{dict(self.names)}); read them as a data.mixture"
            )
        self._ends = list(itertools.accumulate(len(s) for s in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def has(self, column: str) -> bool:
        return any(source.has(column) for source in self.sources)

    def _find(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = bisect.bisect_right(self._ends, i)
        return self.sources[k], i - (self._ends[k - 1] if k else 0)

    def __getitem__(self, i: int) -> Row:
        source, j = self._find(i)
        return source[j]

    def where(self, i: int) -> str:
        source, j = self._find(i)
        return source.where(j)


class Table(Source):
    """Source of rows held in memory as tuples, with the line number of each row's first line."""

    def __init__(self, file: object, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], lines: Sequence[int]):
        self.file, self.columns, self._rows, self._lines = file, _distinct(file, columns), rows, lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Row:
        return dict(zip(self.columns, self._rows[i], strict=True))

    def where(self, i: int) -> str:
        return f"{self.file}:{self._lines[i]}"


class Groups(Source):
    """Source of rows that are stored in groups, as in a Parquet or Arrow file. A few groups are cached in memory.

    Args:
      file: the file, for error messages.
      columns: column names.
      counts: number of rows per group.
      read: returns the rows of a group.
      names: class names of the columns that hold class numbers.
    """

    def __init__(
        self,
        file: object,
        columns: Sequence[str],
        counts: Sequence[int],
        read: Callable[[int], list[Row]],
        names: Names | None = None,
    ):
        self.file, self.columns, self.names = file, _distinct(file, columns), names or {}
        self._ends = list(itertools.accumulate(counts))
        self._group = functools.lru_cache(maxsize=4)(read)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(i)
        g = bisect.bisect_right(self._ends, i)
        return self._group(g)[i - (self._ends[g - 1] if g else 0)]

    def where(self, i: int) -> str:
        return f"{self.file}: row {i + 1}"


def _distinct(file: object, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns. Raises RequestError if two have one name: a row would keep only the last."""
    if twice := [c for k, c in enumerate(columns) if c in columns[:k]]:
        raise RequestError(f"{file}: two columns are called {twice[0]!r}; rename one (columns: {', '.join(columns)})")
    return tuple(columns)


def _named(cfg: SourceConfig) -> list[epath.Path]:
    return resolve(cfg.path) if cfg.path else []


@dataclass(frozen=True)
class Reader:
    """Open one kind of data source; the entry of `SOURCES`.

    Example:
      >>> letters = Reader(lambda cfg: Table("letters", ("text",), [(c,) for c in cfg.name], [1] * len(cfg.name)))
      >>> [row["text"] for row in letters.open(SourceConfig(name="abc"))]
      ['a', 'b', 'c']
    """

    open: Callable[[SourceConfig], Source]
    """Return the rows. Raises RequestError if the data is missing or damaged."""
    inputs: Callable[[SourceConfig], list[epath.Path]] = _named
    """Return the files whose content belongs to a stage's key; those that `path` matches by default."""
    fetch: Callable[[SourceConfig], None] = lambda cfg: None
    """Download the data if the config allows it and the data is missing."""


def of_files(read: Callable[[epath.Path, SourceConfig], Source]) -> Reader:
    """Return the reader of all files that `path` matches, in sorted order; `read` opens one of them."""

    def source(cfg: SourceConfig) -> Source:
        paths = resolve(cfg.path)
        keep_open(len(paths))  # memory-mapped files stay open
        return Chain([read(path, cfg) for path in paths])

    return Reader(source)


def open_source(cfg: SourceConfig) -> Source:
    """Open the source that `cfg` describes.

    Example:
      >>> source = open_source(SourceConfig(source="text", path="pkg:llmctl/__init__.py"))
      >>> source.columns, len(source)
      (('text',), 1)

    Raises:
      RequestError: the data is missing, or it does not have the format of `source`.
    """
    return SOURCES[cfg.source].open(cfg)
