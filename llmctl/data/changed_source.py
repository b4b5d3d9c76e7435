"""Change the rows of a data source when they are read."""

from __future__ import annotations

from llmctl.data.source import Row, Source


class ChangedSource(Source):
    """Read rows of a source, and replace the columns that `changed` returns.

    Example:
        >>> from pathlib import Path
        >>> from llmctl.data.source import Table
        >>> class Loud(ChangedSource):
        ...     def changed(self, row):
        ...         return {"text": row["text"].upper()}
        >>> Loud(Table(Path("file"), ("text", "label"), [("fine", "pos")], [1]))[0]
        {'text': 'FINE', 'label': 'pos'}
    """

    def __init__(self, source: Source) -> None:
        self._source, self.columns, self.names = source, source.columns, source.names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Row:
        row = self._source[i]
        return row | self.changed(row)

    def has(self, column: str) -> bool:
        return self._source.has(column)

    def where(self, i: int) -> str:
        return self._source.where(i)

    def changed(self, row: Row) -> Row:
        """Return the changed columns of a row, by name."""
        raise NotImplementedError
