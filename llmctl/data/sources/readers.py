"""Sources: one function a kind of data, from a config to random access to its rows."""

from __future__ import annotations

from collections.abc import Callable

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.sources import datasets, files
from llmctl.data.sources.base import Chain, Source
from llmctl.data.sources.paths import keep_open, resolve


def _each(read: Callable[[epath.Path, SourceConfig], Source]) -> Callable[[SourceConfig], Source]:
    """A source of all the files that `path` names, in the order of the sorted paths."""

    def source(cfg: SourceConfig) -> Source:
        paths = resolve(cfg.path)
        keep_open(len(paths))  # some stay mapped
        return Chain([read(path, cfg) for path in paths])

    return source


SOURCES: dict[str, Callable[[SourceConfig], Source]] = {
    "text": _each(files.text),
    "jsonl": _each(files.jsonl),
    "csv": _each(files.table),
    "parquet": _each(files.parquet),
    "tfds": datasets.tfds,
    "hf": datasets.hf,
}


def open_source(cfg: SourceConfig) -> Source:
    """The rows that `cfg` names.

    Raises:
        RequestError: missing data, data that is not what `source` says.
    """
    if cfg.source == "prepared":
        raise RequestError(f"{cfg.path}: prepared data holds tokens, and this needs the text; name the raw source")
    return SOURCES[cfg.source](cfg)
