"""Define the parts of a report, independent of the format: sections, paragraphs, tables, plots and code.

Example:
    >>> table = Table("Sizes", ["artifact", "bytes"], [[cell("base"), number(2_000_000, "2 MB")]])
    >>> section = Section("Models", [Paragraph("The run has one model."), table])
    >>> [part.text for part in table.rows[0]]
    ['base', '2 MB']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmctl.config.terminal import visible

Number = int | float
MISSING = "–"
"""Text of a cell without a value."""


@dataclass(frozen=True)
class Cell:
    """Store one cell of a table."""

    text: str
    value: Number | None = None
    """Exact number that `text` rounds; None if the cell has no number."""
    note: str = ""
    """Smaller text below the cell's text, such as an interval."""
    href: str = ""
    """Id of the element of the page that the cell links to; empty for no link."""


@dataclass(frozen=True)
class Table:
    """Store a table. The first cell of each row is the heading of the row."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """Return, for each column, whether its cells are numbers. Dashes count as missing numbers."""
        columns = ([row[i] for row in self.rows] for i in range(len(self.headings)))
        return [
            any(c.value is not None for c in column) and all(c.value is not None or c.text == MISSING for c in column)
            for column in columns
        ]


@dataclass(frozen=True)
class Plot:
    """Store a plot as a Vega-Lite specification, with its data as a table."""

    title: str
    spec: dict[str, Any]
    description: str
    """Alternative text: what the plot shows, in one or two sentences."""
    table: Table
    width: int = 720
    """Maximum width in pixels, and the width without JavaScript."""


@dataclass(frozen=True)
class Paragraph:
    """Store one paragraph of text."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Store a text whose tokens have numbers, such as attributions."""

    title: str
    tokens: Sequence[tuple[str, Number]]
    note: str = ""

    @property
    def strengths(self) -> list[float]:
        """Return the magnitude of each token's number, relative to the largest magnitude in the text."""
        largest = max((abs(value) for _, value in self.tokens), default=0) or 1
        return [round(abs(value) / largest, 3) for _, value in self.tokens]

    @property
    def table(self) -> Table:
        """Return the tokens with their numbers as a table."""
        rows = [[Cell(visible(text.strip() or "␣")), number(value)] for text, value in self.tokens]
        return Table(f"{self.title}: attribution per token", ["token", "attribution"], rows)


@dataclass(frozen=True)
class Code:
    """Store text with fixed line breaks, such as commands or a recipe."""

    title: str
    text: str
    language: str


@dataclass(frozen=True)
class Columns:
    """Store parts that a wide page shows next to each other."""

    blocks: Sequence[Block]


@dataclass(frozen=True)
class Folded:
    """Store parts that the page shows if the reader opens them."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """Store a heading with the parts below it. Sections may be nested."""

    title: str
    blocks: Sequence[Block]
    id: str = ""
    """Id of the section in the page, for links."""


Block = Section | Paragraph | Table | Plot | Tokens | Code | Columns | Folded


@dataclass(frozen=True)
class Document:
    """Store a complete report."""

    title: str
    lead: str
    """One or two sentences below the title."""
    sections: Sequence[Section]
    data: dict[str, Any] = field(default_factory=dict)
    """JSON data that the page contains: the output of `llmctl show --json`."""


def cell(value: Any) -> Cell:
    """Return a cell with text. Control characters become escape sequences."""
    return Cell(visible(str(value)))


def number(value: Number | None, text: str = "", note: str = "") -> Cell:
    """Return a cell with a number, which is formatted with six significant digits if `text` is empty.

    If the value is None, the text is a dash.
    """
    if value is None:
        return Cell(MISSING)
    return Cell(text or plain(value), None if isinstance(value, bool) else value, note)


def plain(value: Number) -> str:
    """Format a number: integers with thousands separators, other numbers with six significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
