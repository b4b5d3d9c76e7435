"""Read prepared data: a corpus that `llmctl prepare` tokenized into ArrayRecord shards.

prepared.json     description: tokenizer digest, splits, sources, shards with counts and checksums
tokenizer/        the tokenizer
*.arrayrecord     one record per document: its token ids as little-endian integers
*.lengths.npy     number of tokens of each document
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from etils import epath
from pydantic import BaseModel, ValidationError

from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig, SourceConfig
from llmctl.data.paths import folder, is_local, keep_open
from llmctl.data.tokenizers.base import Tokenizer

DESCRIPTION = "prepared.json"
FORMAT = 1


class Shard(BaseModel):
    """Description of one ArrayRecord file."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


class Part(BaseModel):
    """Documents of one source in one split, in order."""

    title: str
    weight: float
    epochs: float
    lengths: str
    """File with the number of tokens of each document."""
    shards: list[Shard]


class Prepared(BaseModel):
    """Content of `prepared.json`."""

    format: int
    key: str
    """SHA-256 of everything that determines the content."""
    tokenizer: str
    """Digest of the tokenizer."""
    dtype: str
    """NumPy type of the token ids in a record, such as `<u2`."""
    data: dict[str, Any]
    """Data config of the preparation."""
    splits: dict[str, list[Part]]

    def documents(self, split: str) -> int:
        """Return the number of documents of a split."""
        return sum(s.documents for part in self.splits[split] for s in part.shards)

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split, without beginning-of-sequence and end-of-sequence tokens."""
        return sum(s.tokens for part in self.splits[split] for s in part.shards)


def read(path: str) -> tuple[epath.Path, Prepared]:
    """Return folder and description of prepared data.

    Raises:
      RequestError: there is no prepared data, it is damaged, or its format is later than `FORMAT`.
    """
    where = folder(path)
    if not (where / DESCRIPTION).exists():
        raise RequestError(f"{path}: no prepared data there (no {DESCRIPTION}); llmctl prepare makes it")
    try:
        found = Prepared.model_validate_json((where / DESCRIPTION).read_text())
    except ValidationError:
        raise RequestError(f"{where / DESCRIPTION}: damaged; prepare the data again") from None
    if found.format > FORMAT:
        raise RequestError(f"{path}: prepared by a newer llmctl (format {found.format}, this one reads {FORMAT})")
    return where, found


class Shards:
    """Documents in ArrayRecord shards, with random access (a `corpus.Documents`)."""

    def __init__(self, where: epath.Path, part: Part, dtype: str):
        """Check the shards and read the document lengths.

        Raises:
          RequestError: a shard is missing, or its size differs from the description.
        """
        self._files = [where / s.file for s in part.shards]
        keep_open(len(self._files))  # the files that are read stay open
        for file, shard in zip(self._files, part.shards, strict=True):
            if not file.exists() or file.stat().length != shard.bytes:
                raise RequestError(f"{file}: missing or damaged; prepare the data again")
        with (where / part.lengths).open("rb") as stream:
            self._lengths = np.load(stream, allow_pickle=False).astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._dtype = dtype
        if len(self._lengths) != sum(s.documents for s in part.shards):
            raise RequestError(f"{where / part.lengths}: damaged; prepare the data again")

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, int64 [D]."""
        return self._lengths

    @property
    def tokens(self) -> Shards:
        """Return what `__getitem__` indexes."""
        return self

    def __getitem__(self, at_N: np.ndarray) -> np.ndarray:
        """Return the token ids at these positions, int32 [N]. Each document is read once."""
        if not len(at_N):
            return np.zeros(0, np.int32)
        doc_N = np.searchsorted(self._starts, at_N, "right") - 1
        unique, which_N = np.unique(doc_N, return_inverse=True)
        documents = self._read([int(d) for d in unique])
        starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
        return np.concatenate(documents)[starts[which_N] + at_N - self._starts[doc_N]].astype(np.int32)

    def _read(self, docs: list[int]) -> list[np.ndarray]:
        # `__getitems__` uses a thread per shard, which helps for remote files only. Local reads already run in the data
        # pipeline's threads.
        records = [self._data[d] for d in docs] if is_local(self._files[0]) else self._data.__getitems__(docs)
        documents = [np.frombuffer(r, self._dtype) for r in records]
        for d, document in zip(docs, documents, strict=True):
            if len(document) != self._lengths[d]:
                raise RequestError(f"{self._files[0].parent}: document {d} is damaged; prepare the data again")
        return documents

    @functools.cached_property
    def _data(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource([str(file) for file in self._files])


def check_settings(found: Prepared, part: SourceConfig, cfg: DataConfig, path: str) -> None:
    """Check that the config has no settings that the data was prepared without. They would have no effect.

    Raises:
      RequestError: a setting differs from that of the preparation.
    """
    was = dict(found.data)
    asked = {name: getattr(part, name) for name in ("filter", "replace")}
    asked |= {name: getattr(cfg, name) for name in ("dedup", "validation", "test")}
    if "text" in part.columns and not was.get("mixture"):  # other columns belong to other stages of the recipe
        asked["columns.text"], was["columns.text"] = part.columns["text"], was.get("columns", {}).get("text", "text")
    for name, value in asked.items():
        field = DataConfig.model_fields.get(name)
        if value != was.get(name) and not (field and value == field.default):
            raise RequestError(
                f"{path}: was prepared with data.{name} = {was.get(name)!r}, not {value!r}; prepare it again"
            )


def check(found: Prepared, tokenizer: Tokenizer, path: str) -> None:
    """Check that the data was prepared with this tokenizer.

    Raises:
      RequestError: it was prepared with another one.
    """
    if found.tokenizer != tokenizer.digest:
        raise RequestError(
            f"{path}: prepared with another tokenizer ({found.tokenizer[:12]}) than the model's "
            f"({tokenizer.digest[:12]}); prepare it with tokenizer.path = the model's tokenizer"
        )
