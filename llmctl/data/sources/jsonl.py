"""Read JSON lines (`data.source = "jsonl"`)."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.file_bytes import buffer, line_offsets
from llmctl.data.source import Row, Source, of_files

ROWS, BYTES = 1000, 16_000_000
"""Maximum numbers of rows and of bytes that are read to find the column names. If a later row has another column that
llmctl would read, such as `label`, reading the row raises an error."""


class JsonLines(Source):
    """Read a file of JSON lines: one object per line.

    Line offsets are found at construction, and rows are parsed at access. `columns` contains the keys of the first
    rows: at most `ROWS` rows, within the first `BYTES` bytes.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._bytes = buffer(path)
        self._starts, self._ends, self._lines = line_offsets(self._bytes, path)
        self.columns = self._first_columns()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Row:
        try:
            # `json.loads` of bytes would take zero bytes for another encoding. Half surrogate pairs are left to `View`.
            text = self._bytes[self._starts[i] : self._ends[i]].decode("utf-8-sig", "surrogatepass")
            row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{self.where(i)}: not valid JSON ({error})") from None
        if isinstance(row, _Twice):
            raise RequestError(f"{self.where(i)}: key {row.name!r} is there twice; remove one")
        if not isinstance(row, dict):
            raise RequestError(f"{self.where(i)}: a line must hold a JSON object, not {type(row).__name__}")
        return row

    def has(self, column: str) -> bool:
        return column in self.columns or any(column in row for row in self)

    def where(self, i: int) -> str:
        return f"{self._path}:{self._lines[i]}"

    def _first_columns(self) -> tuple[str, ...]:
        found = dict.fromkeys(self[0]) if len(self) else {}
        for i in range(1, min(ROWS, len(self))):
            if self._ends[i] > BYTES:
                break
            try:
                found |= dict.fromkeys(self[i])
            except RequestError:  # the first row is refused here, the others when they are read
                break
        return tuple(found)


class _Twice(dict[str, Any]):
    """Mark a JSON object that contains a key twice. Python's parser would keep only the last value of the key."""

    name = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = _Twice(found)
    twice.name = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return twice


SOURCE = of_files(lambda path, cfg: JsonLines(path))
