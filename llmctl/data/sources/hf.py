"""Read Hugging Face datasets saved by `save_to_disk` (`data.source = "hf"`), without the `datasets` library."""

from __future__ import annotations

from typing import Any

from etils import epath

from llmctl.config.base import hint
from llmctl.config.containment import within
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data import class_names
from llmctl.data.config import SourceConfig
from llmctl.data.paths import files_below, folder, is_local, keep_open
from llmctl.data.source import Chain, Groups, Reader, Source


def hf(cfg: SourceConfig) -> Source:
    """Open a folder that `save_to_disk` of Hugging Face `datasets` wrote. Arrow streams are memory-mapped.

    Raises:
        RequestError: If the folder has another format or lacks the split, or if a file is damaged or outside the
            folder.
    """
    path = folder(cfg.path)
    if (path / "dataset_dict.json").exists():
        splits = _read_json(path / "dataset_dict.json")["splits"]
        if cfg.split not in splits:
            raise RequestError(
                f"{cfg.path}: no split {cfg.split!r}{hint(cfg.split, splits)} (splits: {', '.join(splits)})"
            )
        path /= cfg.split
    if not (path / "state.json").exists():
        raise RequestError(f"{path}: not a folder that save_to_disk of Hugging Face datasets wrote (no state.json)")
    state = _read_json(path / "state.json")
    if state.get("_indices_files"):
        raise RequestError(f"{path}: rows are selected by an index file; save it again after flatten_indices()")
    keep_open(len(state["_data_files"]))  # memory-mapped files stay open
    info = path / "dataset_info.json"
    names = class_names.of_features(_read_json(info).get("features")) if info.exists() else None
    return Chain([_arrow(within(path, file["filename"]), names) for file in state["_data_files"]])


def _read_json(file: epath.Path) -> dict[str, Any]:
    try:
        said = parse_json(file.read_bytes())
    except (OSError, ValueError):
        said = None
    if not isinstance(said, dict):
        raise RequestError(f"{file}: damaged; save the data set again")
    return said


def _arrow(path: epath.Path, names: class_names.Names | None) -> Source:
    """Open one Arrow stream.

    Args:
        path: Path of the file.
        names: Class names by column; None reads them from the stream's schema.
    """
    import pyarrow as pa

    try:
        file = pa.memory_map(str(path)) if is_local(path) else pa.BufferReader(path.read_bytes())
        with pa.ipc.open_stream(file) as stream:
            schema, batches = stream.schema, list(stream)
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: not an Arrow stream ({str(error).splitlines()[0]})") from None
    names = class_names.of_schema(schema.metadata) if names is None else names
    return Groups(path, schema.names, [b.num_rows for b in batches], lambda g: batches[g].to_pylist(), names)


SOURCE = Reader(hf, lambda cfg: files_below(cfg.path))
