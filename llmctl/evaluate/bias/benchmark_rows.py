"""Read the rows of a bias benchmark from a file of JSON lines or CSV."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.source import Row, open_source
from llmctl.evaluate.bias.settings import BenchmarkConfig


class BenchmarkRow(NamedTuple):
    """Store one row of a benchmark, and its location for error messages."""

    columns: Row
    where: str

    def text(self, name: str) -> str:
        """Return the text in a column.

        Raises:
            RequestError: If the column is missing, or has only white space.
        """
        value = self.columns.get(name)
        if not isinstance(value, str) or not value.strip():
            raise RequestError(f"{self.where}: the column {name!r} has no text")
        return value

    def one_of(self, name: str, values: Sequence[str]) -> str:
        """Return the text in a column that has one of several values.

        Raises:
            RequestError: If the column has another value.
        """
        if (value := self.text(name)) not in values:
            raise RequestError(f"{self.where}: {name} {value!r} is not one of {', '.join(values)}")
        return value


def read(config: BenchmarkConfig) -> list[BenchmarkRow]:
    """Return the rows of a benchmark in the order of the file; at most `config.examples` rows, sampled by their hash.

    Raises:
        RequestError: If the file is missing, damaged or empty.
    """
    kind = "csv" if ".csv" in PurePosixPath(config.path).suffixes else "jsonl"
    source = open_source(SourceConfig(source=kind, path=config.path))
    rows = [BenchmarkRow(source[i], source.where(i)) for i in range(len(source))]
    if not rows:
        raise RequestError(f"{config.path}: has no rows")
    if config.examples:
        order = sorted(range(len(rows)), key=lambda i: _hash(rows[i].columns))
        rows = [rows[i] for i in sorted(order[: config.examples])]
    return rows


def digest(config: BenchmarkConfig) -> str:
    """Return the digest of the rows of a benchmark."""
    return _hash([row.columns for row in read(config)])


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogatepass")).hexdigest()
