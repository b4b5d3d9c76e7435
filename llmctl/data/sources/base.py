"""What a source is: rows by number that know where they stand in their file.

A source is a sequence of dicts of column -> value (so Grain reads it as it is) that also names the place of each row,
because an error about data is worth little without the place.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


class Source:
    """Rows by number. `columns` lists what a row can have (jsonl rows may differ: those of the first)."""

    columns: tuple[str, ...] = ()

    def where(self, i: int) -> str:
        """File and line (or row) of row i, for messages."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> Row:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


class Chain(Source):
    """Sources one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = [s for s in sources if len(s)] or list(sources[:1])
        self.columns = tuple(dict.fromkeys(c for s in sources for c in s.columns))
        self._ends = list(itertools.accumulate(len(s) for s in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

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
    """Rows held in memory as tuples, with the line each began on."""

    def __init__(self, file: object, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], lines: Sequence[int]):
        self.file, self.columns, self._rows, self._lines = file, tuple(columns), rows, lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Row:
        return dict(zip(self.columns, self._rows[i], strict=True))

    def where(self, i: int) -> str:
        return f"{self.file}:{self._lines[i]}"


class Groups(Source):
    """Rows that are stored in groups (of a Parquet or Arrow file), a few of which are kept in memory."""

    def __init__(self, file: object, columns: Sequence[str], counts: Sequence[int], read: Callable[[int], list[Row]]):
        self.file, self.columns = file, tuple(columns)
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
