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
    """Read delimited text with a header line. Fields may be quoted and contain line breaks (RFC 4180)."""
    csv.field_size_limit(2**31 - 1)  # The default limit refuses documents larger than 128 KiB.
    opened = io.StringIO(content(path), newline="")
    # Without `strict`, an unclosed quote would turn the rest of the file into one field.
    reader = csv.reader(opened, delimiter=cfg.delimiter, strict=True)
    rows, lines, line = [], [], 1
    try:
        columns = next(reader, [])
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                if len(fields) != len(columns):
                    raise RequestError(f"{path}:{line}: {len(fields)} fields where the header has {len(columns)}")
                rows.append(tuple(fields))
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"{path}:{line}: not valid CSV ({error})") from None
    return Table(path, columns, rows, lines)


SOURCE = of_files(table)
