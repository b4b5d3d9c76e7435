"""Make columns from a source's rows: texts from templates, and questions from the words of the classes.

With words for the classes (`data.words`), a labelled row is also a multiple-choice question. Its choices are the words,
and its answer is the word of the row's class.
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
    """Make the columns of `data.template`."""

    def __init__(self, cfg: SourceConfig, given: Mapping[str, str], asks: bool) -> None:
        """Compile the templates.

        Args:
            cfg: Settings of the source.
            given: Column of the source by canonical column.
            asks: Whether rows have a label and no choices, so that the words of the classes make a question.

        Raises:
            RequestError: If a template is no valid jinja2 template.
        """
        self._words, self._templates = cfg.words, RowTemplates(cfg.template, cfg.words)
        self._made = cfg.template
        self._class_of = {canonical(name): name for name in cfg.words}
        self._asks = bool(asks and cfg.template and len(cfg.words) > 1)
        # Templates may read labels also for a task that does not.
        self.readable = {c: t for c, t in given.items() if c not in CHAT_COLUMNS} if cfg.template else {}
        """Columns that templates may read, by canonical column."""

    def columns(self, texts: Collection[str]) -> tuple[str, ...]:
        """Return the names of the columns that are made, without the text columns that the source has."""
        made = [c for c in TEXT_COLUMNS if c in self._made and c not in texts]
        return (*made, *(("choices", "answer") if self._asks else ()))

    def made(self, row: Row, raw: Row, label: Callable[[Any], str], where: str) -> Row:
        """Return the columns that templates make, and the words of the classes as choices.

        Args:
            row: Canonical columns of the row.
            raw: All columns of the source.
            label: Function from a label of the row to its class name.
            where: Location of the row, for errors.

        Raises:
            RequestError: If a template fails, or if the label has no word.
        """
        values: Row = {}
        for ours, theirs in self.readable.items():
            value = row.get(ours, raw.get(theirs))
            if ours == "label" and not isinstance(value, list) and ("label" in self._templates.reads or self._asks):
                value = label(value)
                value = self._class_of.get(canonical(value), value)
            values[ours] = value
        made: Row = self._templates.render(row | values, raw, where)
        if not self._asks:
            return made
        names = [*self._words]
        if values["label"] not in names:
            raise RequestError(f"{where}: the label {values['label']!r} has no word in data.words")
        return made | {"choices": tuple(self._words.values()), "answer": names.index(values["label"])}
