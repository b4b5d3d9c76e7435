"""Open data sources by name: one function per kind of data, from a config to a `Source`."""

from __future__ import annotations

from collections.abc import Callable

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.sources import datasets, files
from llmctl.data.sources.base import Chain, Source
from llmctl.data.sources.paths import keep_open, resolve


def _each(read: Callable[[epath.Path, SourceConfig], Source]) -> Callable[[SourceConfig], Source]:
    """Build a source function for all files that `path` matches, in sorted order."""

    def source(cfg: SourceConfig) -> Source:
        paths = resolve(cfg.path)
        keep_open(len(paths))  # memory-mapped files stay open
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
    """Open the source that `cfg` describes.

    Example:
      >>> source = open_source(SourceConfig(source="text", path="pkg:llmctl/__init__.py"))
      >>> source.columns, len(source)
      (('text',), 1)

    Raises:
      RequestError: the data is missing, or it does not have the format of `source`.
    """
    if cfg.source == "prepared":
        raise RequestError(f"{cfg.path}: prepared data holds tokens, and this needs the text; name the raw source")
    return SOURCES[cfg.source](cfg)
