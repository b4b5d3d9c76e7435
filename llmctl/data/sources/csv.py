"""Read delimited text with a header line (`data.source = "csv"`)."""

from __future__ import annotations

import csv
import io

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.file_bytes import content
from llmctl.data.source import Source, Table, of_files


def table(path: epath.Path, cfg: SourceConfig) -> Source:
    """Read a delimited text file with a header line.

    Quoted fields may contain line breaks (RFC 4180).

    Raises:
        RequestError: If the file is not valid CSV, or if a row has too few or too many fields.
    """
    csv.field_size_limit(2**31 - 1)  # The default limit refuses documents larger than 128 KiB.
    opened = io.StringIO(content(path), newline="")
    # Without `strict`, an unclosed quote would turn the rest of the file into one field.
    reader = csv.reader(opened, delimiter=cfg.delimiter, strict=True)
    rows, lines, line = [], [], 1
    try:
        columns = next(reader, [])
        if "\0" in "".join(columns):
            raise RequestError(f"{path}:1: not UTF-8 text (it has zero bytes, as UTF-16 has); convert the file first")
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                if len(fields) != len(columns):
                    raise RequestError(
                        f"{path}:{line}: {len(fields)} fields where the header has {len(columns)}{other(columns)}"
                    )
                rows.append(tuple(fields))
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"{path}:{line}: not valid CSV ({error})") from None
    keep = _filled(path, columns, rows)
    if len(keep) < len(columns):
        columns, rows = [columns[k] for k in keep], [tuple(row[k] for k in keep) for row in rows]
    return Table(path, columns, rows, lines)


def _filled(path: epath.Path, columns: list[str], rows: list[tuple[str, ...]]) -> list[int]:
    """Return the indices of the columns to keep: all columns that have a name or a value.

    Spreadsheets add empty columns without a name. The first column may lack a name, as in tables with row numbers.

    Raises:
        RequestError: If another column has values but no name.
    """
    keep = []
    for k, name in enumerate(columns):
        if k and not name.strip():
            if any(row[k].strip() for row in rows):
                raise RequestError(f"{path}:1: column {k + 1} of the header has no name; give it one")
            continue
        keep.append(k)
    return keep


SOURCE = of_files(table)


def other(columns: list[str]) -> str:
    """Return a hint if the header has only one field, and this field contains another delimiter. Otherwise, return "".

    Example:
        >>> other(["text;label"]), other(["text", "label"])
        ("; are they separated by ';' (data.delimiter)?", '')
    """
    found = [c for c in (";", "\t", "|") if len(columns) == 1 and c in columns[0]]
    return f"; are they separated by {found[0]!r} (data.delimiter)?" if found else ""
