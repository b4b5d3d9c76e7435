"""Format a report as Markdown (GitHub's dialect). Plots become their tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from llmctl.cli.report.document import (
    Block,
    Cell,
    Code,
    Columns,
    Document,
    Folded,
    Paragraph,
    Plot,
    Section,
    Table,
    Tokens,
)
from llmctl.config.terminal import visible

SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$@:])")
"""Characters that Markdown may read as markup; a backslash before them prevents this. A colon may begin a link."""


def text(document: Document) -> str:
    """Return the report as the text of a Markdown file."""
    lines = [f"# {escaped(document.title)}", escaped(document.lead)]
    for section in document.sections:
        lines += _section(section, 2)
    return "\n\n".join(lines) + "\n"


def escaped(value: str) -> str:
    r"""Return text that Markdown shows literally, on one line.

    Example:
        >>> escaped("a|b *c* <script>")
        'a\\|b \\*c\\* &lt;script&gt;'
    """
    one_line = " ".join(visible(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return SPECIAL.sub(r"\\\1", one_line)


def _section(section: Section, level: int) -> Iterator[str]:
    yield f"{'#' * min(level, 6)} {escaped(section.title)}"
    yield from _blocks(section.blocks, level + 1)


def _blocks(blocks: Sequence[Block], level: int) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, Section):
            yield from _section(block, level)
        elif isinstance(block, Paragraph):
            yield _paragraph(block.text)
        elif isinstance(block, Table):
            yield from _table(block)
        elif isinstance(block, Plot):
            yield from (f"**{escaped(block.title)}**", _paragraph(block.description), *_table(block.table))
        elif isinstance(block, Tokens):
            yield f"**{escaped(block.title)}** {escaped(block.note)}".rstrip()
            yield from _table(block.table)
        elif isinstance(block, Code):
            yield from (f"{_paragraph(block.title)}:", _fenced(block))
        elif isinstance(block, Folded):
            yield f"**{escaped(block.title)}**"
            yield from _blocks(block.blocks, level)
        elif isinstance(block, Columns):
            yield from _blocks(block.blocks, level)


def _paragraph(value: str) -> str:
    """Return a paragraph. A beginning that Markdown reads as a list or a line is escaped."""
    return re.sub(r"^([-+=]|\d+[.)])", lambda found: f"\\{found.group()}", escaped(value))


def _table(table: Table) -> Iterator[str]:
    yield f"{_paragraph(table.caption)}:"
    head = "| " + " | ".join(map(escaped, table.headings)) + " |"
    rule = "| " + " | ".join("--:" if right else "---" for right in table.numeric) + " |"
    yield "\n".join([head, rule, *("| " + " | ".join(map(_cell, row)) + " |" for row in table.rows)])


def _cell(cell: Cell) -> str:
    body = "<br>".join(escaped(line) for line in cell.text.split("\n"))
    return f"{body} ({escaped(cell.note)})" if cell.note else body


def _fenced(code: Code) -> str:
    """Return a code block whose fence is longer than every run of backticks in the code."""
    longest = max((len(run) for run in re.findall("`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{code.language}\n{code.text}\n{fence}"
