"""Read JSON lines (`data.source = "jsonl"`)."""

from __future__ import annotations

import json

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.file_bytes import buffer, line_offsets
from llmctl.data.source import Row, Source, of_files


class JsonLines(Source):
    """Source of JSON lines: one object per line. Line offsets are found at construction; rows are parsed at access."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._bytes = buffer(path)
        self._starts, self._ends, self._lines = line_offsets(self._bytes)
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


SOURCE = of_files(lambda path, cfg: JsonLines(path))
