"""Define the block `{% generation %}` of chat templates, which marks the assistant's tokens.

The text of a block is rendered between two marks, which are characters that no other text contains. `spans` finds and
removes the marks.

Example:
    >>> spans(f"ab{BEGIN}cd{END}e")
    ('abcde', [(2, 4)])
"""

from __future__ import annotations

import re

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

BEGIN, END = "\ufdd1", "\ufdd2"
"""Marks before and after the text of a block: two Unicode noncharacters. Both characters are removed from messages, so
that they occur nowhere else."""


class GenerationBlock(Extension):
    """Extend Jinja by the block `{% generation %} ... {% endgeneration %}`, whose content is rendered between marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return Jinja's syntax tree of the block's content, between two marks."""
        next(parser.stream)
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return [begin, *inside, end]


def spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove the marks of `{% generation %}` blocks from a rendered text.

    Returns:
        The text without marks, and the range [first, last) of the characters of each block.
    """
    text, found, first = "", [], 0
    for part in re.split(f"([{BEGIN}{END}])", marked):
        if part == BEGIN:
            first = len(text)
        elif part == END:
            found.append((first, len(text)))
        else:
            text += part
    return text, found
