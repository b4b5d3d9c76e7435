"""Define the block `{% generation %}` of chat templates, which marks the assistant's tokens.

Training uses the marks to select tokens. To render a prompt, only the content of the block is needed.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class GenerationBlock(Extension):
    """Render `{% generation %} ... {% endgeneration %}` as its content, as a Jinja extension."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the parsed nodes inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
