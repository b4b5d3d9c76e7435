"""Read rows one by one from a file or from standard input: JSON lines, CSV, or text.

If a row cannot be read, an error is yielded in place of the row, and reading continues.
"""

from __future__ import annotations

import csv
import itertools
import json
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.data import multiple_choice
from llmctl.data.chats import NAMES
from llmctl.data.config import COLUMNS, TEXT_COLUMNS, sentence_pair
from llmctl.data.source import Row

FORMATS = ("jsonl", "csv", "tsv", "text")
LONGEST = 1 << 24
"""Maximum line length in bytes. A longer line is skipped and reported as an error."""
MAX_WAIT = 0.2
"""Maximum time in seconds to wait for another row, before the rows read so far are yielded."""

Read = tuple[str, Row | RequestError]
"""Pair (location of a row, the row). If the row cannot be read, the second element is the error."""


def rows(stream: IO[bytes], name: str, kind: str, columns: dict[str, str]) -> Iterator[Read]:
    """Yield the rows of a stream, with columns renamed to llmctl's own names, such as text and label.

    Args:
        stream: Bytes in UTF-8; a byte order mark is skipped.
        name: Name of the stream, with which the locations of rows begin.
        kind: A format of `FORMATS`. If empty, the format is JSON lines if the first line begins with a brace, else
            text.
        columns: Columns to rename, as {llmctl's column name (such as text): column name in the stream}.

    Example:
        >>> import io
        >>> list(rows(io.BytesIO(b'{"text": "a", "n": 1}'), "in", "", {}))
        [('in:1', {'text': 'a'})]
    """
    for ours in columns:
        if ours not in COLUMNS:
            raise RequestError(
                f"--column: unknown column {ours!r}{hint(ours, list(COLUMNS))} (ours: {', '.join(COLUMNS)})"
            )
    lines = _lines(stream)
    first = next(((n, line) for n, line in lines if line.strip()), None)
    if first is None:
        return
    kind = kind or ("jsonl" if first[1].lstrip().startswith("{") else "text")
    lines = itertools.chain([first], lines)
    table = kind in ("csv", "tsv")
    read = _table(lines, name, "," if kind == "csv" else "\t", columns) if table else _each(lines, kind)
    for number, row in read:
        where = f"{name}:{number}"
        if isinstance(row, dict):
            yield where, _canonical(row, columns or sentence_pair(row), where)
        else:
            yield where, RequestError(f"{where}: {row}")


def column_names(text: str) -> tuple[str, str]:
    """Split the value of the flag `--column`, such as "text=review", into (llmctl's column name, name in the stream).

    Raises:
        RequestError: If a name is missing.
    """
    ours, equals, theirs = text.partition("=")
    if not (equals and ours and theirs):
        raise RequestError(f"--column {text}: must look like text=review")
    return ours, theirs


def in_windows(read: Iterator[Read], size: int) -> Iterator[list[Read]]:
    """Yield lists of `size` rows, or shorter lists if the stream pauses. A thread reads up to two lists ahead.

    Raises:
        RequestError: If the stream cannot be read.
    """
    waiting: queue.Queue[Any] = queue.Queue(2 * size)
    end = object()

    def fill() -> None:
        try:
            for one in read:
                waiting.put(one)
            waiting.put(end)
        except BaseException as e:  # raised again by the reader of the queue
            waiting.put(e)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        window: list[Read] = []
        found: Any = waiting.get()
        try:
            while found is not end and not isinstance(found, BaseException):
                window.append(found)
                if len(window) == size:
                    break
                found = waiting.get(timeout=MAX_WAIT)
        except queue.Empty:
            found = None
        if window:
            yield window
        if isinstance(found, BaseException):
            raise found
        if found is end:
            return


def standard_input() -> IO[bytes]:
    """Return standard input as a new stream, which is independent of `sys.stdin`.

    When the process exits, a thread may still wait for a line. Python closes `sys.stdin` at exit, and would abort if a
    thread uses it.
    """
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError):  # replaced by a stream without a file
        return sys.stdin.buffer


def of_path(path: Path) -> str:
    """Return the format that a file's suffix implies, or "" if the suffix is unknown."""
    return {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}.get(path.suffix, "")


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of all lines. Bytes that are not UTF-8 become lone surrogates."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST)
        if not line:
            return
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (more := stream.readline(LONGEST)) and not more.endswith(b"\n"):
                pass
            line = b"\0"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line.decode(errors="surrogateescape").removesuffix("\n").removesuffix("\r")


def _fault(line: str) -> str:
    if line == "\0":
        return f"longer than {LONGEST:,} bytes"
    try:
        line.encode()
    except UnicodeEncodeError:
        return "not UTF-8 text"
    return ""


def _each(lines: Iterator[tuple[int, str]], kind: str) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        if wrong := _fault(line):
            yield number, wrong
        elif kind == "text":
            yield number, {"text": line}
        else:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as e:
                yield number, f"not JSON ({e})"
                continue
            if isinstance(found, str):
                found = {"text": found}
            yield number, found if isinstance(found, dict) else f"a JSON {type(found).__name__}, not an object"


def _table(
    lines: Iterator[tuple[int, str]], name: str, delimiter: str, columns: dict[str, str]
) -> Iterator[tuple[int, Any]]:
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for number, line in lines:
            at = number
            yield f"{line}\n"

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as e:
        raise RequestError(f"the header is not CSV ({e})") from None
    if twice := [name for name in header if header.count(name) > 1]:
        raise RequestError(f"two columns are named {twice[0]!r}")
    readable = columns or sentence_pair(header)
    if header and not any(readable.get(ours, ours) in header for ours in TEXT_COLUMNS):
        raise RequestError(
            f"{name}: none of its columns is a text column; set --column, such as text={header[0]} "
            f"(columns: {', '.join(header)})"
        )
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield at, f"not CSV ({e})"
            continue
        if wrong := next((w for cell in cells if (w := _fault(cell))), ""):
            yield at, wrong
        elif not cells:
            continue
        elif len(cells) != len(header):
            yield at, f"{len(cells)} cells, and the header has {len(header)} columns"
        else:
            yield at, dict(zip(header, cells, strict=True))


def _canonical(row: dict[str, Any], columns: dict[str, str], where: str) -> Row | RequestError:
    """Rename the columns of a row to llmctl's own names. If a value has the wrong type, return an error.

    Args:
        row: Values by column name in the stream.
        columns: Columns to rename, as {llmctl's column name: column name in the stream}.
        where: Location of the row, for the error message.
    """
    out: Row = {}
    for ours in (*TEXT_COLUMNS, "tokens", "choices", "tools", *NAMES):
        theirs = columns.get(ours, ours)
        value = row.get(theirs)
        if value is None:
            if ours in columns:
                return RequestError(
                    f"{where}: no column {theirs!r}{hint(theirs, list(row))} (columns: {', '.join(row)})"
                )
            continue
        if ours in ("tools", *NAMES):  # read by the model that answers conversations
            out.setdefault("tools" if ours == "tools" else "messages", value)
            continue
        if ours == "tokens":
            if not (isinstance(value, list) and value and all(isinstance(word, str) for word in value)):
                return RequestError(f"{where}: column {theirs!r} is not a list of words")
        elif ours == "choices":
            if not multiple_choice.holds_choices(value) and ours not in columns:
                continue  # another column of this name
            try:
                value = multiple_choice.texts_of(value)[0]
            except RequestError as e:
                return RequestError(f"{where}: column {theirs!r}: {e}")
        elif not isinstance(value, str):
            return RequestError(f"{where}: column {theirs!r} holds {type(value).__name__}, not text")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return RequestError(f"{where}: column {theirs!r} holds a lone surrogate")
        out[ours] = value
    return out
