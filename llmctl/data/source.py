"""Define the base classes of data sources, and open sources.

A source is a sequence of rows, which are dicts {column: value}. A source also returns the location of each row in its
file, for error messages.
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
    In JSON lines, rows may have different columns. `columns` then lists the columns of the first rows, and `has`
    searches all rows.

    Example:
      >>> source = Table("quotes.txt", ("text",), [("To be",), ("or not to be",)], lines=[1, 3])
      >>> source[1], source.where(1)
      ({'text': 'or not to be'}, 'quotes.txt:3')
    """

    columns: tuple[str, ...] = ()
    names: Names = {}
    """Class names of each column that contains class numbers, in the order of the numbers. {} if the data declares no
    names."""

    def has(self, column: str) -> bool:
        """Return True if at least one row may have the column."""
        return column in self.columns

    def where(self, i: int) -> str:
        """Return the location of row i for error messages: the file, and the line or row number."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> Row:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


class Chain(Source):
    """Concatenate several sources into one."""

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
    """Store rows in memory as tuples, with the line number of each row."""

    def __init__(self, file: object, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], lines: Sequence[int]):
        self.file, self.columns, self._rows, self._lines = file, _distinct(file, columns), rows, lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Row:
        return dict(zip(self.columns, self._rows[i], strict=True))

    def where(self, i: int) -> str:
        return f"{self.file}:{self._lines[i]}"


class Groups(Source):
    """Read rows that are stored in groups: row groups of a Parquet file, or record batches of an Arrow file. A few
    groups are cached in memory.

    Args:
        file: The file, for error messages.
        columns: Column names.
        counts: Number of rows per group.
        read: Function that returns the rows of a group by its index.
        names: Class names of the columns with class numbers.
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


def arrow_rows(damaged: str, batch: Any) -> list[Row]:
    """Check an Arrow table or batch, and return its rows.

    Without the check, wrong offsets could read memory outside the data.

    Args:
        damaged: Beginning of the error message.
        batch: The table or batch.

    Raises:
        RequestError: If the data is damaged, or if Python cannot represent a value, such as a date after the year 9999.
    """
    import pyarrow as pa

    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise RequestError(f"{damaged} ({' '.join(str(error).split())[:200]})") from None


def _distinct(file: object, columns: Sequence[str]) -> tuple[str, ...]:
    """Check that column names are distinct, and return them as a tuple.

    Raises:
        RequestError: If two columns have the same name, because a row would contain only the last column.
    """
    if twice := [c for k, c in enumerate(columns) if c in columns[:k]]:
        raise RequestError(f"{file}: two columns are called {twice[0]!r}; rename one (columns: {', '.join(columns)})")
    return tuple(columns)


def _named(cfg: SourceConfig) -> list[epath.Path]:
    return resolve(cfg.path) if cfg.path else []


@dataclass(frozen=True)
class Reader:
    """Define one kind of data source by three functions: open the data, list the input files, and download the data.

    The registry `SOURCES` contains such objects.

    Example:
      >>> letters = Reader(lambda cfg: Table("letters", ("text",), [(c,) for c in cfg.name], [1] * len(cfg.name)))
      >>> [row["text"] for row in letters.open(SourceConfig(name="abc"))]
      ['a', 'b', 'c']
    """

    open: Callable[[SourceConfig], Source]
    """Function that opens the data and returns its rows. If the data is missing or damaged, the function raises
    RequestError."""
    inputs: Callable[[SourceConfig], list[epath.Path]] = _named
    """Function that returns the input files. If the content of an input file changes, the stage runs again. By default,
    the input files are the files that the setting `path` matches."""
    fetch: Callable[[SourceConfig], None] = lambda cfg: None
    """Function that downloads missing data, if the config allows it."""


def of_files(read: Callable[[epath.Path, SourceConfig], Source]) -> Reader:
    """Return a `Reader` that reads all files that the setting `path` matches, in sorted order.

    Args:
        read: Function that opens one file.
    """

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
      RequestError: If the data is missing, or does not have the format of `source`.
    """
    return SOURCES[cfg.source].open(cfg)
