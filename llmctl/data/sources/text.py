"""Read plain UTF-8 text (`data.source = "text"`)."""

from __future__ import annotations

import itertools

from etils import epath

from llmctl.data.config import SourceConfig
from llmctl.data.file_bytes import content, lines
from llmctl.data.source import Row, Source, Table, of_files


class TextFile(Source):
    """Give access to a text file as a single document. The file is read at each access."""

    columns = ("text",)

    def __init__(self, path: epath.Path):
        self._path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Row:
        if i:
            raise IndexError(i)
        return {"text": content(self._path)}

    def where(self, i: int) -> str:
        return str(self._path)


def text(path: epath.Path, cfg: SourceConfig) -> Source:
    """Open a plain UTF-8 text file as documents in the column `text`.

    Depending on `cfg.documents`, a document is the file, a line or a paragraph.
    """
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


SOURCE = of_files(text)
