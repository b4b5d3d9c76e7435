"""Map the columns of a source to llmctl's own (canonical) column names, filter rows and replace text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.config.base import format_toml, hint
from llmctl.config.errors import RequestError
from llmctl.data import chats, column_choice, multiple_choice
from llmctl.data.cells import CHATS, CellReader
from llmctl.data.config import (
    CHAT_COLUMNS,
    COLUMNS,
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    DataConfig,
    SourceConfig,
)
from llmctl.data.label_values import Labels, Unlabeled, canonical, plain
from llmctl.data.source import Row, Source, open_source
from llmctl.data.template_columns import TemplateColumns


class View(Source):
    """Wrap a source to rename its columns to canonical names, filter rows and replace text.

    Canonical names are llmctl's own column names, such as `text`, `label`, `prompt` and `completion`.

    `read` returns None for rows that the filter removes. If the data has a column `tokens` (lists of words) but no
    column `text`, a column `text` is added. It contains the words joined by spaces. If `data.classes` is empty or
    contains a class name that the data declares, class names replace class numbers.

    For tasks with conversations, only the columns `messages` and `tools` are mapped. Messages are converted to the
    format of `llmctl.data.chats`. For other tasks, these two columns are not mapped.
    """

    def __init__(
        self,
        cfg: SourceConfig,
        classes: Sequence[str] = (),
        numbers: bool = False,
        labels: bool = True,
        conversations: bool = False,
        checks: Labels | None = None,
    ):
        """Open the source and map its columns.

        Args:
            cfg: Settings of the source.
            classes: Label values that the data may have (`data.classes`); empty allows all.
            numbers: Whether labels are numbers. Numbers have no class names.
            labels: Whether to map label columns. Pretraining reads no labels.
            conversations: Whether the rows are conversations.
            checks: Object that converts a label in a cell to the label that templates read; None leaves labels
                unchanged.

        Raises:
            RequestError: If the source lacks a column, or has no text column.
        """
        self._checks = checks
        self._cfg, self._source = cfg, open_source(cfg)
        self.where = self._source.where
        known = self._source.columns
        given = column_choice.of_source(cfg, self._source, conversations)
        hidden = set(COLUMNS) - CHAT_COLUMNS if conversations else CHAT_COLUMNS | (set() if labels else LABEL_COLUMNS)
        self._absent = set() if cfg.columns else set(COLUMNS) - set(known) - hidden
        # In the order of COLUMNS, whatever the config's order, because the first text column decides the split.
        self._map = {c: given[c] for c in COLUMNS if c in given and c not in hidden}
        self._texts = [c for c in self._map if c in TEXT_COLUMNS]
        self._cells = CellReader(self._map, self._clean)
        labeled = labels and "label" in self._map and "choices" not in self._map
        self._template = TemplateColumns(cfg, given, labeled)
        named = {c: n for c, n in self._source.names.items() if not classes or set(classes) & set(n)}
        self._names = {
            c: named[t]
            for c, t in (self._map | self._template.readable).items()
            if t in named and not (numbers and c == "label")
        }
        self.classes = next((self._names[c] for c in ("label", "tags") if c in self._names and c in self._map), ())
        """Class names that the data declares for its labels, in the order of class numbers. Empty if the data declares
        no names."""
        self._joined = ["text"] if "tokens" in self._map and "text" not in self._map else []
        self.texts = (*self._joined, *self._texts)
        """Text columns. The text of the first text column determines a row's split."""
        made = self._template.columns(self.texts)
        self.columns = (*self._joined, *self._map, *made)
        if len(self._source) and not (self.texts or "messages" in self._map):
            wrong = column_choice.NO_CHATS if conversations else column_choice.without_text(self._source[0])
            if cfg.template:
                wrong = "data.template needs a text column whose text decides each row's split; " + wrong
            raise RequestError(f"{cfg.title}: {wrong} (columns: {', '.join(known)})")
        self._keep = {
            column: [(plain(v), isinstance(v, str)) for v in (value if isinstance(value, list) else [value])]
            for column, value in cfg.filter.items()
        }

    def source_name(self, ours: str) -> str:
        """Return the source's name for the column that llmctl calls `ours`."""
        return self._map.get(ours, ours)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Row:
        raw = self._source[i]
        row = self._canonical(raw, i)
        return row | self._from_template(row, raw, i)

    def read(self, i: int) -> tuple[Row, Row] | None:
        """Return row i as two dicts: the columns read from the source, and the columns that templates create.

        Deduplication and splitting use only the first dict. The same texts are therefore held out with and without
        templates.

        Returns:
            The two dicts {canonical column: value}, or None if the filter removes the row.

        Raises:
            RequestError: If the row lacks a column, or if a value has the wrong type.
            Unlabeled: If a label is missing.
        """
        raw = self._source[i]
        for column, allowed in self._keep.items():
            if column not in raw:
                raise RequestError(f"{self.where(i)}: no column {column!r} to filter by (columns: {', '.join(raw)})")
            if not self._allows(column, raw[column], allowed):
                return None
        late = self._absent & raw.keys()
        if late and (late := [c for c in column_choice.default_columns({*self._source.columns, *raw}) if c in late]):
            raise RequestError(
                f"{self.where(i)}: column {late[0]!r} is in none of the first rows; name the columns to read in "
                f"data.columns, such as {format_toml({c: c for c in (*self._map, late[0])})}"
            )
        row = self._canonical(raw, i)
        return row, self._from_template(row, raw, i)

    def _canonical(self, raw: Row, i: int) -> Row:
        row = {}
        for ours, theirs in self._map.items():
            if theirs not in raw and ours not in ("pair", "tools"):
                error = Unlabeled if ours in LABEL_COLUMNS else RequestError
                raise error(
                    f"{self.where(i)}: no column {theirs!r}{hint(theirs, list(raw))} (columns: {', '.join(raw)})"
                )
            row[ours] = raw.get(theirs)
            if ours in self._names:
                row[ours] = self._class_name(ours, row[ours], i)
                if row[ours] is None and ours in self._texts:
                    raise Unlabeled(f"{self.where(i)}: the label is empty (column {theirs!r} holds {raw[theirs]!r})")
        for ours in self._texts:
            value = row[ours]
            if value is None:
                value = ""
            if not isinstance(value, str):
                what = CHATS if chats.is_chat(value) else f"{type(value).__name__}, not text"
                if isinstance(value, list) and value and isinstance(value[0], str):
                    what += "; write one text per row, or map lists of words to tokens"
                raise RequestError(f"{self.where(i)}: column {self._map[ours]!r} holds {what}")
            row[ours] = self._clean(value)
        if "tokens" in row:
            row |= self._cells.words(row, self.where(i))
        if self._joined:
            row["text"] = " ".join(row["tokens"])
        if "answers" in row:
            row["answers"] = self._cells.answers(row, self.where(i))
        # other columns of that name are no questions
        if "answer" in row and multiple_choice.holds_choices(row.get("choices")):
            row |= self._cells.question(row, self.where(i))
        if "messages" in row:
            row |= self._cells.conversation(row, self.where(i))
        return row

    def _from_template(self, row: Row, raw: Row, i: int) -> Row:
        """Return the columns that templates create for row i.

        Args:
            row: Values of the row by canonical column name.
            raw: Values of the row by the source's column names.
            i: Index of the row.
        """
        if not self._cfg.template:
            return {}

        def label(value: Any) -> str:
            if "label" in self._names and "label" not in row:
                value = self._class_name("label", value, i)
            try:
                return plain(self._checks.label(value) if self._checks else value)
            except RequestError as e:
                raise type(e)(f"{self.where(i)}: {e}") from None

        return self._template.render(row, raw, label, self.where(i))

    def compared_texts(self, row: Row) -> list[str]:
        """Return the texts of a row that deduplication and splitting use.

        The hash of the first text determines the row's split (train, validation or test). Rows whose texts are all
        equal are duplicates.
        """
        if "messages" in row:
            return [chats.first_user_message(row["messages"]), chats.as_json_text(row["messages"], row["tools"])]
        choices = row["choices"] if "answer" in row and isinstance(row.get("choices"), tuple) else ()
        return [*(row[c] for c in self.texts), *choices]

    def _allows(self, column: str, value: Any, allowed: list[tuple[str, bool]]) -> bool:
        """Return True if the filter of a column allows a value.

        A value matches an allowed value with the same text. A class number also matches its class name. Other spellings
        of a number or boolean match too, such as 1 and "1.0", unless both values are strings.

        Args:
            column: Column of the source.
            value: Value of the row.
            allowed: Allowed values as pairs (text of the value, whether the value is a string in the config).
        """
        names = self._source.names.get(column, ())
        # If a value in the filter is a class name, it means that class, even if it is also the number of another class.
        if plain(_name(names, value)) in {v for v, _ in allowed}:
            return True
        text = plain(value)
        return any(
            text == v or (canonical(text) == canonical(v) and not (is_text and isinstance(value, str)))
            for v, is_text in allowed
            if v not in names
        )

    def _class_name(self, ours: str, value: Any, i: int) -> Any:
        """Replace a class number, or each number of a list, by the class name that the data declares.

        A negative number means that there is no label, and becomes None.
        """
        names = self._names[ours]
        found = [_name(names, v) for v in value] if isinstance(value, list) else _name(names, value)
        if odd := [v for v in (found if isinstance(found, list) else [found]) if isinstance(v, int)]:
            raise RequestError(
                f"{self.where(i)}: column {self._map[ours]!r} holds class {odd[0]}, and the data declares "
                f"{len(names)} ({', '.join(names[:8])}{', …' * (len(names) > 8)})"
            )
        return found

    def _clean(self, value: str) -> str:
        if not value.isascii():  # JSON may contain half a surrogate pair, which is not valid text: it becomes U+FFFD
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for old, new in self._cfg.replace.items():
            value = value.replace(old, new)
        return value


def views(cfg: DataConfig, labels: bool = True, conversations: bool = False) -> list[View]:
    """Open every source of a data config, and map its columns.

    Args:
        cfg: Settings of the data.
        labels: Whether to map label columns.
        conversations: Whether the rows are conversations.

    Raises:
        RequestError: If a source lacks a column, or has no text column.
    """
    numbers = cfg.label_type == "number"
    return [
        View(part, cfg.classes, numbers, labels, conversations, Labels(cfg, part.columns.get("label", "label")))
        for part in cfg.sources()
    ]


def holds_conversations(cfg: DataConfig) -> bool:
    """Return True if every source has a column of conversations.

    Raises:
        RequestError: If a source cannot be opened.
    """
    return all(
        part.columns.get("messages") or column_choice.conversations_of(open_source(part)) for part in cfg.sources()
    )


def _name(names: Sequence[str], value: Any) -> Any:
    """Replace a class number by its class name, or a negative number by None. Other values are returned unchanged."""
    if isinstance(value, float) and value.is_integer():  # a column of integers with gaps
        value = int(value)
    if not names or isinstance(value, bool) or not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else None
