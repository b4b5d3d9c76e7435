"""`{% generation %}` block of chat templates, which marks the assistant's tokens.

Training reads the marks to know which tokens count. Rendering a prompt needs the text inside only.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class GenerationBlock(Extension):
    """Jinja extension that renders `{% generation %} ... {% endgeneration %}` as its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
