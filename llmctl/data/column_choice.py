"""Choose the columns to read from a source, and give advice if a source lacks columns."""

from __future__ import annotations

from collections.abc import Collection

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.data import chats
from llmctl.data.cells import CHATS
from llmctl.data.config import COLUMNS, TEXT_COLUMNS, TOGETHER, SourceConfig, sentence_pair
from llmctl.data.source import Row, Source

NO_CHATS = (
    'none of its columns holds conversations; name one in data.columns, such as { messages = "dialog" } (lists of '
    '{"role", "content"} or {"from", "value"})'
)


def of_source(cfg: SourceConfig, source: Source, conversations: bool) -> dict[str, str]:
    """Return the columns to read from a source, as {canonical name: name in the source}.

    The setting `data.columns` lists the columns. If the setting is empty, columns with canonical names are read. If
    none of these columns contains text, two text columns with well-known names are read (see `sentence_pair`).

    Args:
        cfg: Settings of the source.
        source: The source.
        conversations: Whether the rows are conversations.

    Raises:
        RequestError: If the source lacks a column of the settings. If a canonical name is unknown. If conversations
            have a template.
    """
    known = source.columns
    for wanted in [*cfg.columns.values(), *cfg.filter]:
        if len(source) and not source.has(wanted):
            raise RequestError(
                f"{cfg.title}: no column {wanted!r}{hint(wanted, list(known)) or _other_source(cfg)} "
                f"(columns: {', '.join(known)})"
            )
    for ours in cfg.columns:
        if ours not in COLUMNS:
            raise RequestError(
                f"data.columns: unknown column {ours!r}{hint(ours, list(COLUMNS))} (ours: {', '.join(COLUMNS)})"
            )
    given = cfg.columns or {c: c for c in default_columns(known)}
    if not cfg.columns and not {*given} & {*TEXT_COLUMNS, "tokens"}:
        given |= sentence_pair(known)
    if conversations:
        if cfg.template:
            raise RequestError(
                f"{cfg.title}: data.template makes text columns, and a chat template renders conversations; "
                "leave data.template out"
            )
        given = dict(zip(("messages",), conversations_of(source), strict=False)) | given
        given = {"tools": "tools"} | given if "tools" in known else given
    return given


def default_columns(known: Collection[str]) -> list[str]:
    """Return the columns to read from a source with the columns `known`, if `data.columns` is empty."""
    partial = set().union(*(group for group in TOGETHER if not group <= set(known)))
    return [c for c in COLUMNS if c in known and c not in partial]


def conversations_of(source: Source) -> list[str]:
    """Return a list with the name of the source's column of conversations. If there is no such column, return [].

    The column is recognized by its name, or by its value in the first row.
    """
    named = [c for c in chats.NAMES if c in source.columns]
    held = [c for c, value in source[0].items() if chats.is_chat(value)] if len(source) and not named else []
    return (named or held)[:1]


def without_text(row: Row) -> str:
    """Return advice for an error about data without a text column.

    The advice names a column of `row` that may contain the text.
    """
    if found := next((column for column, value in row.items() if chats.is_chat(value)), None):
        return f"column {found!r} holds {CHATS}"
    if text := next((column for column, value in row.items() if isinstance(value, str)), None):
        return f'none of its columns is a text column; set data.columns, such as {{text = "{text}"}}'
    return "none of its columns holds text"


def _other_source(cfg: SourceConfig) -> str:
    """Return a hint if a file with the suffix .csv, .jsonl or .parquet is read as plain text. Otherwise, return ""."""
    kinds = [kind for kind in ("csv", "jsonl", "parquet") if f".{kind}" in cfg.path]
    return f'; set data.source = "{kinds[0]}" to read its columns' if kinds and cfg.source == "text" else ""
