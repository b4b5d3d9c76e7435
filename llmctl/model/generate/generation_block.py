"""Define the block `{% generation %}` of chat templates, which marks the assistant's tokens.

The text of a block is rendered between two characters that stand for nothing else. Training reads which tokens are
between them, and every rendering removes them.

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
"""Characters around the text of a block. They are Unicode noncharacters, and are removed from messages."""


class GenerationBlock(Extension):
    """Render the content of `{% generation %} ... {% endgeneration %}` between two marks, as a Jinja extension."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the parsed nodes inside the block, between two marks."""
        next(parser.stream)
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return [begin, *inside, end]


def spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a rendered text without marks, and the ranges [first, last) of characters inside blocks."""
    text, found, first = "", [], 0
    for part in re.split(f"([{BEGIN}{END}])", marked):
        if part == BEGIN:
            first = len(text)
        elif part == END:
            found.append((first, len(text)))
        else:
            text += part
    return text, found
