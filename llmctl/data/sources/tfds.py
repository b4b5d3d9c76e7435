"""Read TFDS datasets that are stored as ArrayRecord (`data.source = "tfds"`), without TensorFlow."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from etils import epath

from llmctl.config.base import hint
from llmctl.config.containment import check
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data import class_names
from llmctl.data.config import SourceConfig
from llmctl.data.source import Reader, Row, Source

TFDS_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>\d+\.\d+\.\d+))?")


class Tfds(Source):
    """Give random access to the rows of a TFDS split.

    Nested features become columns such as `translation/en`. Sequences become lists.
    """

    def __init__(self, named: str, data: Any, names: class_names.Names):
        self._named, self._data, self.names = named, data, names
        self.columns = tuple(self[0]) if len(self) else ()  # every example has every feature

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            return {column: _plain(value) for column, value in _flat(self._data[i]).items()}
        except Exception as error:  # ArrayRecord and TFDS raise many types for a damaged file
            raise RequestError(f"{self.where(i)}: damaged ({_first(error)}); prepare the data set again") from None

    def where(self, i: int) -> str:
        return f"{self._named}: example {i}"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # an image, for example: an error only if it is read as text
    rank = getattr(value, "ndim", None)
    if rank == 1:
        return [_plain(v) for v in value.tolist()]
    return value.item() if rank == 0 else value


def tfds(cfg: SourceConfig) -> Source:
    """Open a split of a TFDS dataset stored as ArrayRecord (https://www.tensorflow.org/datasets/data_source).

    Raises:
        RequestError: If the dataset is not on disk, lacks the split, or has a file format without random access.
    """
    fetch(cfg)
    import tensorflow_datasets

    where = tfds_folder(cfg)
    check(where)
    _check_classes(where)
    try:
        builder: Any = tensorflow_datasets.builder_from_directory(where)
        splits = list(builder.info.splits)
        features = builder.info.features
    except Exception as error:  # TFDS raises many types for a damaged description
        raise RequestError(f"{where}: damaged ({_first(error)}); prepare the data set again") from None
    wanted = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\[[^\]]*\]", "", cfg.split)))
    if not wanted or wanted - set(splits):
        absent = ", ".join(sorted(wanted - set(splits))) or cfg.split
        raise RequestError(f"{cfg.name}: no split {absent!r}{hint(absent, list(splits))} (splits: {', '.join(splits)})")
    try:
        data = builder.as_data_source(split=cfg.split)
        return Tfds(f"{cfg.name} {cfg.split}", data, class_names.of_tfds(features))
    except RequestError:
        raise
    except NotImplementedError:
        raise RequestError(
            f"{where}: stored in a file format that has no random access; prepare it again as array_record "
            "(tfds build --file_format=array_record)"
        ) from None
    except (ValueError, AssertionError) as error:
        raise RequestError(f"{cfg.name}: bad split {cfg.split!r} ({_first(error)})") from None
    except Exception as error:  # as for the description
        raise RequestError(f"{where}: damaged ({_first(error)}); prepare the data set again") from None


def _first(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200] or type(error).__name__}"


def _check_classes(where: epath.Path) -> None:
    """Check that features.json contains only names of TFDS classes, because TFDS imports the module of every class.

    Raises:
        RequestError: If the file contains the name of another class, or is damaged.
    """
    file = where / "features.json"
    if not file.exists():
        return
    try:
        waiting = [parse_json(file.read_bytes())]
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: damaged ({_first(error)}); prepare the data set again") from None
    while waiting:
        item = waiting.pop()
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting.extend(inner)
        named = item.get("pythonClassName", item.get("type")) if isinstance(item, dict) else None
        if isinstance(named, str) and "." in named and not named.startswith("tensorflow_datasets."):
            raise RequestError(f"{file}: names the class {named!r}, and only those of TFDS are loaded")


def fetch(cfg: SourceConfig) -> None:
    """Download and prepare a TFDS dataset if it is missing and `cfg.download` is true.

    Raises:
        RequestError: If TFDS has no such dataset.
    """
    if not cfg.download or _versions(cfg):
        return
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(cfg.name, data_dir=str(_tfds_root(cfg)), file_format="array_record")
    except tensorflow_datasets.core.DatasetNotFoundError:
        raise RequestError(f"TFDS knows no data set {cfg.name!r}") from None
    builder.download_and_prepare()


def tfds_folder(cfg: SourceConfig) -> epath.Path:
    """Return the folder of the newest dataset version that matches `cfg.name`, without importing TFDS.

    Raises:
        RequestError: If nothing matches, or if several configs match.
    """
    found = _versions(cfg)
    if not found:
        root = _tfds_root(cfg)
        there = [p.name for p in root.iterdir()] if root.is_dir() else []
        raise RequestError(
            f"no TFDS data set {cfg.name!r} in {root}{hint(cfg.name, there)}; "
            "set data.data_dir, or data.download = true"
        )
    configs = sorted({str(version.parent) for version in found})
    if len(configs) > 1:
        names = ", ".join(f"{cfg.name}/{Path(c).name}" for c in configs)
        raise RequestError(f"{cfg.name}: several configs, choose one: {names}")
    return max(found, key=lambda version: tuple(map(int, version.name.split("."))))


def tfds_files(cfg: SourceConfig) -> list[epath.Path]:
    """Return all files of the dataset, or an empty list if the dataset is not downloaded yet.

    Raises:
        RequestError: If several configs of the dataset match `cfg.name`.
    """
    if cfg.download and not _versions(cfg):
        return []
    return sorted(tfds_folder(cfg).iterdir())


def _tfds_root(cfg: SourceConfig) -> epath.Path:
    return epath.Path(cfg.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _versions(cfg: SourceConfig) -> list[epath.Path]:
    """Return the folders `name[/config]/version` that contain a dataset and match `cfg.name`."""
    named = TFDS_NAME.fullmatch(cfg.name)
    if not named:
        raise RequestError(f"data.name = {cfg.name!r} should read name, name/config or name/config:1.2.3")
    base = _tfds_root(cfg) / named["name"] / (named["config"] or "")
    levels = [base, *([] if named["config"] else _folders(base))]
    versions = [p for level in levels for p in _folders(level) if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    return [p for p in versions if named["version"] in (None, p.name) and (p / "dataset_info.json").exists()]


def _folders(path: epath.Path) -> list[epath.Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def _flat(features: Any, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in features.items():
        # TFDS stores a sequence of records as one list per field. It stays one column, as in SQuAD's `answers`.
        nested = isinstance(value, dict) and not all(isinstance(v, list) for v in value.values())
        flat |= _flat(value, f"{prefix}{name}/") if nested else {prefix + name: value}
    return flat


SOURCE = Reader(tfds, tfds_files, fetch)
