"""Create text columns from the other columns of a row, by Jinja templates.

With a template, labeled texts can be turned into prompts and completions, for example. Templates are part of recipes,
which other people may have written. Templates therefore run in the sandbox of `llmctl.data.template_sandbox`.

Example:
    >>> templates = RowTemplates({"prompt": "{{ text }} It was", "completion": " {{ words[label] }}"}, {"pos": "great"})
    >>> templates.render({"text": "Loved it.", "label": "pos"}, {"text": "Loved it.", "label": 1}, "row 1")
    {'prompt': 'Loved it. It was', 'completion': ' great'}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.config.errors import RequestError


class RowTemplates:
    """Create the text columns of a row by Jinja templates."""

    def __init__(self, templates: Mapping[str, str], words: Mapping[str, str]) -> None:
        """Compile the templates.

        Args:
            templates: Text of a jinja2 template for each column to create, by column name (such as prompt).
            words: Word for each class, by class name. Templates can read these words.

        Raises:
            RequestError: If a template is no valid jinja2 template.
        """
        self.words, self._compiled = dict(words), {}
        self.variables: set[str] = set()
        """Names of the variables that the templates read."""
        if not templates:  # jinja2 is imported only if there is a template
            return
        from jinja2 import StrictUndefined, TemplateError, meta

        from llmctl.data.template_sandbox import Sandbox

        self._sandbox = Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
        for column, text in templates.items():
            try:
                self._compiled[column] = self._sandbox.from_string(text)
                self.variables |= meta.find_undeclared_variables(self._sandbox.parse(text))
            except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as e:
                raise RequestError(f"data.template.{column}: no valid template ({type(e).__name__}: {e})") from None

    def render(self, columns: Mapping[str, Any], row: Mapping[str, Any], where: str) -> dict[str, str]:
        """Render all templates for one row, and return {created column: text}.

        Args:
            columns: Values of the row by llmctl's own column names.
            row: Values of the row by the source's column names.
            where: Location of the row, for error messages.

        Raises:
            RequestError: If a template fails, for example because it reads a column that the row lacks.
        """
        made: dict[str, str] = {}
        for column, template in self._compiled.items():
            try:
                made[column] = self._sandbox.render(template, {**columns, "row": row, "words": self.words})
            except Exception as e:  # a template may raise anything
                reason = (str(e) or type(e).__name__).splitlines()[0]
                raise RequestError(f"{where}: data.template.{column} fails: {reason}") from None
        return made
