"""Read Apache Parquet files (`data.source = "parquet"`)."""

from __future__ import annotations

import io

from etils import epath

from llmctl.config import limits
from llmctl.config.errors import RequestError
from llmctl.data import class_names
from llmctl.data.config import SourceConfig
from llmctl.data.paths import is_local
from llmctl.data.source import Groups, Row, Source, arrow_rows, of_files


def parquet(path: epath.Path, cfg: SourceConfig) -> Source:
    """Open an Apache Parquet file, with class names if the schema declares them.

    Raises:
        RequestError: If the file is damaged or has another format, or if a row group exceeds the memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path if is_local(path) else io.BytesIO(path.read_bytes()))
        schema = file.schema_arrow
        columns = schema.names
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RequestError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:200]})") from None
    for g in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(g).total_byte_size
        limits.check_memory(size, f"{path}: row group {g}", "write the file with smaller row groups")
    counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]

    def read(group: int) -> list[Row]:
        try:
            table = file.read_row_group(group)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RequestError(f"{path}: damaged in row group {group} ({' '.join(str(error).split())[:200]})") from None
        return arrow_rows(f"{path}: damaged in row group {group}", table)

    return Groups(path, columns, counts, read, class_names.of_schema(schema.metadata))


SOURCE = of_files(parquet)
