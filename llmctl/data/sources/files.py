"""Read the rows of one file: text, JSON lines, CSV or Parquet, with one function per format."""

from __future__ import annotations

import csv
import io
import itertools
import json
import mmap
from pathlib import Path

import numpy as np
from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.sources.base import Groups, Row, Source, Table
from llmctl.data.sources.paths import is_local


class TextFile(Source):
    """Source with a whole text file as its only document. The file is read at each access."""

    columns = ("text",)

    def __init__(self, path: epath.Path):
        self._path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Row:
        if i:
            raise IndexError(i)
        return {"text": _text(self._path, bytes(_buffer(self._path)))}

    def where(self, i: int) -> str:
        return str(self._path)


class JsonLines(Source):
    """Source of JSON lines: one object per line. Line offsets are found at construction; rows are parsed at access."""

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
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{self.where(i)}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise RequestError(f"{self.where(i)}: a line must hold a JSON object, not {type(row).__name__}")
        return row

    def where(self, i: int) -> str:
        return f"{self._path}:{self._lines[i]}"


def text(path: epath.Path, cfg: SourceConfig) -> Source:
    """Read plain UTF-8 text. The file, each line, or each paragraph is one document (column `text`)."""
    if cfg.documents == "file":
        return TextFile(path)
    if cfg.documents == "line":
        kept = [(n, line) for n, line in lines(path) if line.strip()]
        return Table(path, ("text",), [(line,) for _, line in kept], [n for n, _ in kept])
    rows, numbers = [], []
    for filled, block in itertools.groupby(lines(path), key=lambda numbered: bool(numbered[1].strip())):
        if filled:
            block = list(block)
            rows.append(("\n".join(line for _, line in block),))
            numbers.append(block[0][0])
    return Table(path, ("text",), rows, numbers)


def lines(path: epath.Path) -> list[tuple[int, str]]:
    """Return the lines of a UTF-8 text file with their numbers, from 1.

    A line ends with LF or CRLF only: U+2028, U+0085 and form feeds are part of a text. A byte order mark is skipped.

    Raises:
      RequestError: the file is not UTF-8 text.
    """
    return [(n, line.removesuffix("\r")) for n, line in enumerate(content(path).split("\n"), 1)]


def content(path: epath.Path) -> str:
    """Return the text of a UTF-8 file without a byte order mark.

    Raises:
      RequestError: the file is not UTF-8 text.
    """
    return _text(path, bytes(_buffer(path)))


def jsonl(path: epath.Path, cfg: SourceConfig) -> Source:
    """Read JSON lines: one JSON object per line."""
    return JsonLines(path)


def table(path: epath.Path, cfg: SourceConfig) -> Source:
    """Read delimited text with a header line. Fields may be quoted and contain line breaks (RFC 4180)."""
    csv.field_size_limit(2**31 - 1)  # The default limit refuses documents larger than 128 KiB.
    content = io.StringIO(_text(path, bytes(_buffer(path))), newline="")
    # Without `strict`, an unclosed quote would turn the rest of the file into one field.
    reader = csv.reader(content, delimiter=cfg.delimiter, strict=True)
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
    """Read an Apache Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path if is_local(path) else io.BytesIO(path.read_bytes()))
    except (OSError, pa.ArrowException) as error:
        raise RequestError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]

    def read(group: int) -> list[Row]:
        try:
            return file.read_row_group(group).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise RequestError(f"{path}: damaged in row group {group} ({str(error).splitlines()[0]})") from None

    return Groups(path, file.schema_arrow.names, counts, read)


def _buffer(path: epath.Path) -> bytes | mmap.mmap:
    """Return a file's bytes: decompressed (.gz, .zst), memory-mapped if local and not empty, or read."""
    if path.suffix in (".gz", ".zst"):
        return _decompressed(path)
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
    """Return byte offsets of starts and ends, and line numbers, of all lines that are not blank."""
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 0x0A) if len(data) else np.zeros(0, np.int64)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        ends = np.append(ends, len(data))
    starts = np.concatenate([[start], ends[:-1] + 1]) if len(ends) else ends
    full = np.array([bool(data[a:b].strip()) for a, b in zip(starts, ends, strict=True)], bool)
    return starts[full], ends[full], np.flatnonzero(full) + 1


def _decompressed(path: epath.Path) -> bytes:
    import pyarrow as pa

    kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    try:
        with pa.input_stream(pa.BufferReader(path.read_bytes()), compression=kind) as stream:
            return stream.read()
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: damaged {path.suffix} file ({str(error).splitlines()[0]})") from None
