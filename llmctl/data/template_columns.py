"""Create additional columns for the rows of a source: texts from templates, and multiple-choice questions.

The setting `data.words` gives a word for each class, such as "great" for the class pos. If there are templates and at
least two words, a labeled row also becomes a multiple-choice question. The choices are these words, and the correct
choice is the word of the row's class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.data.config import CHAT_COLUMNS, TEXT_COLUMNS, SourceConfig
from llmctl.data.label_values import canonical
from llmctl.data.row_templates import RowTemplates
from llmctl.data.source import Row


class TemplateColumns:
    """Create the columns that the settings `data.template` and `data.words` define for one source."""

    def __init__(self, cfg: SourceConfig, given: Mapping[str, str], labeled: bool) -> None:
        """Compile the templates.

        Args:
            cfg: Settings of the source.
            given: Column names of the source, as {llmctl's column name: column name in the source}.
            labeled: Whether rows have a label and no choices, so that they can become multiple-choice questions.

        Raises:
            RequestError: If a template is no valid jinja2 template.
        """
        self._words, self._templates = cfg.words, RowTemplates(cfg.template, cfg.words)
        self._made = cfg.template
        self._class_of = {canonical(name): name for name in cfg.words}
        self._is_choice = bool(labeled and cfg.template and len(cfg.words) > 1)
        # Templates may read the label even if the task does not.
        self.readable = {c: t for c, t in given.items() if c not in CHAT_COLUMNS} if cfg.template else {}
        """Columns that templates may read: {llmctl's name for the column: name in the source}."""

    def columns(self, texts: Collection[str]) -> tuple[str, ...]:
        """Return the names of the columns to create, without the text columns `texts` that the source already has."""
        made = [c for c in TEXT_COLUMNS if c in self._made and c not in texts]
        return (*made, *(("choices", "answer") if self._is_choice else ()))

    def render(self, row: Row, raw: Row, label: Callable[[Any], str], where: str) -> Row:
        """Return the values of the created columns for one row.

        Args:
            row: Values of the row by llmctl's own column names.
            raw: Values of the row by the source's column names.
            label: Function from the label in a cell to the class name.
            where: Location of the row, for error messages.

        Raises:
            RequestError: If a template fails, or if `data.words` has no word for the label's class.
        """
        values: Row = {}
        for ours, theirs in self.readable.items():
            value = row.get(ours, raw.get(theirs))
            if (
                ours == "label"
                and not isinstance(value, list)
                and ("label" in self._templates.variables or self._is_choice)
            ):
                value = label(value)
                value = self._class_of.get(canonical(value), value)
            values[ours] = value
        made: Row = self._templates.render(row | values, raw, where)
        if not self._is_choice:
            return made
        names = [*self._words]
        if values["label"] not in names:
            raise RequestError(f"{where}: the label {values['label']!r} has no word in data.words")
        return made | {"choices": tuple(self._words.values()), "answer": names.index(values["label"])}
