"""Read Hugging Face datasets saved by `save_to_disk` (`data.source = "hf"`), without the `datasets` library."""

from __future__ import annotations

from typing import Any, TypeGuard

from etils import epath

from llmctl.config.base import hint
from llmctl.config.containment import within
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data import class_names
from llmctl.data.config import SourceConfig
from llmctl.data.paths import files_below, folder, is_local, keep_open
from llmctl.data.source import Chain, Groups, Reader, Source, arrow_rows


def hf(cfg: SourceConfig) -> Source:
    """Open a folder that `save_to_disk` of Hugging Face `datasets` wrote. Arrow streams are memory-mapped.

    Raises:
        RequestError: If the folder has another format or lacks the split, or if a file is damaged or outside the
            folder.
    """
    path = folder(cfg.path)
    if (path / "dataset_dict.json").exists():
        splits = _read_json(within(path, "dataset_dict.json")).get("splits")
        if not _texts(splits):
            raise _damaged(path / "dataset_dict.json")
        if cfg.split not in splits:
            raise RequestError(
                f"{cfg.path}: no split {cfg.split!r}{hint(cfg.split, splits)} (splits: {', '.join(splits)})"
            )
        path /= cfg.split
    if not (path / "state.json").exists():
        raise RequestError(f"{path}: not a folder that save_to_disk of Hugging Face datasets wrote (no state.json)")
    state = _read_json(within(path, "state.json"))
    if state.get("_indices_files"):
        raise RequestError(f"{path}: rows are selected by an index file; save it again after flatten_indices()")
    listed = state.get("_data_files")
    files: Any = [f.get("filename") if isinstance(f, dict) else f for f in listed] if isinstance(listed, list) else None
    if not _texts(files):
        raise _damaged(path / "state.json")
    keep_open(len(files))  # memory-mapped files stay open
    info, names = path / "dataset_info.json", None
    if info.exists():
        try:
            names = class_names.of_features(_read_json(within(path, info.name)).get("features"))
        except (ValueError, TypeError):
            raise _damaged(info) from None
    return Chain([_arrow(within(path, file), names) for file in files])


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _damaged(file: epath.Path) -> RequestError:
    return RequestError(f"{file}: damaged; save the data set again")


def _read_json(file: epath.Path) -> dict[str, Any]:
    try:
        said = parse_json(file.read_bytes())
    except (OSError, ValueError):
        said = None
    if not isinstance(said, dict):
        raise _damaged(file)
    return said


def _arrow(path: epath.Path, names: class_names.Names | None) -> Source:
    """Open one Arrow stream.

    Args:
        path: Path of the file.
        names: Class names by column; None reads them from the schema of the stream.
    """
    import pyarrow as pa

    try:
        file = pa.memory_map(str(path)) if is_local(path) else pa.BufferReader(path.read_bytes())
        with pa.ipc.open_stream(file) as stream:
            schema, batches = stream.schema, list(stream)
        columns = schema.names
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RequestError(f"{path}: not an Arrow stream ({' '.join(str(error).split())[:200]})") from None
    names = class_names.of_schema(schema.metadata) if names is None else names
    return Groups(
        path,
        columns,
        [b.num_rows for b in batches],
        lambda g: arrow_rows(f"{path}: damaged in batch {g}", batches[g]),
        names,
    )


SOURCE = Reader(hf, lambda cfg: files_below(cfg.path))
