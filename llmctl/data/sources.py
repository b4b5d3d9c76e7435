"""Sources: one function a kind of file, each giving random access to its rows as dicts of column -> value.

A source is a sequence (so Grain reads it as it is) that also knows where each row stands in its file, because an
error about data is worth little without the place.
"""

from __future__ import annotations

import bisect
import csv
import functools
import io
import itertools
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from llmctl.data import SourceConfig
from llmctl.data.paths import is_local, resolve
from llmctl.errors import RequestError

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


def open_source(cfg: SourceConfig) -> Source:
    """The rows of all files that `cfg` names, in the order of the sorted paths.

    Raises:
        RequestError: missing files, files that are not what `source` says.
    """
    if not cfg.path:
        raise RequestError(f"data has no path: set path (source = {cfg.source!r})")
    return Chain([FILES[cfg.source](path, cfg) for path in resolve(cfg.path)])


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

    def where(self, i: int) -> str:  # noqa: D102
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

    def where(self, i: int) -> str:  # noqa: D102
        return f"{self.file}:{self._lines[i]}"


class TextFile(Source):
    """A whole file as one document, read when asked for."""

    columns = ("text",)

    def __init__(self, path: epath.Path):
        self._path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Row:
        if i:
            raise IndexError(i)
        return {"text": _text(self._path, bytes(_buffer(self._path)))}

    def where(self, i: int) -> str:  # noqa: D102
        return str(self._path)


class JsonLines(Source):
    """One JSON object a line; lines are found at once and parsed when asked for."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._bytes = _buffer(path)
        self._starts, self._ends, self._lines = _lines(self._bytes)
        self.columns = tuple(self[0]) if len(self) else ()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Row:
        try:
            row = json.loads(self._bytes[self._starts[i] : self._ends[i]])
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"{self.where(i)}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise RequestError(f"{self.where(i)}: a line must hold a JSON object, not {type(row).__name__}")
        return row

    def where(self, i: int) -> str:  # noqa: D102
        return f"{self._path}:{self._lines[i]}"


class Parquet(Source):
    """Rows of a Parquet file; a few row groups are kept in memory."""

    def __init__(self, path: epath.Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        try:
            self._file = pq.ParquetFile(path if is_local(path) else io.BytesIO(path.read_bytes()))
        except pa.ArrowInvalid as error:
            raise RequestError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
        meta = self._file.metadata
        self.columns = tuple(self._file.schema_arrow.names)
        self._ends = list(itertools.accumulate(meta.row_group(g).num_rows for g in range(meta.num_row_groups)))
        self._group = functools.lru_cache(maxsize=4)(lambda g: self._file.read_row_group(g).to_pylist())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> Row:
        g = bisect.bisect_right(self._ends, i)
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._group(g)[i - (self._ends[g - 1] if g else 0)]

    def where(self, i: int) -> str:  # noqa: D102
        return f"{self._path}: row {i + 1}"


def text(path: epath.Path, cfg: SourceConfig) -> Source:
    """Plain UTF-8 text: the file, each line or each paragraph is a document (column `text`)."""
    if cfg.documents == "file":
        return TextFile(path)
    lines = _text(path, bytes(_buffer(path))).split("\n")
    if cfg.documents == "line":
        kept = [(n, line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]
        return Table(path, ("text",), [(line,) for _, line in kept], [n for n, _ in kept])
    rows, numbers = [], []
    for filled, block in itertools.groupby(enumerate(lines, 1), key=lambda numbered: bool(numbered[1].strip())):
        if filled:
            block = list(block)
            rows.append(("\n".join(line.rstrip("\r") for _, line in block),))
            numbers.append(block[0][0])
    return Table(path, ("text",), rows, numbers)


def jsonl(path: epath.Path, cfg: SourceConfig) -> Source:
    """One JSON object a line."""
    return JsonLines(path)


def table(path: epath.Path, cfg: SourceConfig) -> Source:
    """Delimited text with a header line; fields may be quoted and span lines (RFC 4180)."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 128 KiB
    reader = csv.reader(io.StringIO(_text(path, bytes(_buffer(path))), newline=""), delimiter=cfg.delimiter)
    rows, lines, line = [], [], 1
    try:
        columns = next(reader, [])
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                if len(fields) != len(columns):
                    raise RequestError(f"{path}:{line}: {len(fields)} fields where the header has {len(columns)}")
                rows.append(tuple(fields))
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"{path}:{line}: not valid CSV ({error})") from None
    return Table(path, columns, rows, lines)


def parquet(path: epath.Path, cfg: SourceConfig) -> Source:
    """Apache Parquet."""
    return Parquet(path)


FILES: dict[str, Callable[[epath.Path, SourceConfig], Source]] = {
    "text": text,
    "jsonl": jsonl,
    "csv": table,
    "parquet": parquet,
}
"""Source kinds that read files, one file at a time."""


def _buffer(path: epath.Path) -> bytes | mmap.mmap:
    """The bytes of a file: mapped where it is local and not empty, read otherwise."""
    if not is_local(path) or not path.stat().length:
        return path.read_bytes()
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _text(path: epath.Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError(f"{path}:{line}: not UTF-8 text (byte {error.start}); convert the file first") from None


def _lines(data: bytes | mmap.mmap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and line numbers of the lines that are not blank."""
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 0x0A) if len(data) else np.zeros(0, np.int64)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        ends = np.append(ends, len(data))
    starts = np.concatenate([[start], ends[:-1] + 1]) if len(ends) else ends
    full = np.array([bool(data[a:b].strip()) for a, b in zip(starts, ends, strict=True)], bool)
    return starts[full], ends[full], np.flatnonzero(full) + 1
