"""Read prepared data: a corpus that `llmctl prepare` tokenized into ArrayRecord shards.

The folder contains:

prepared.json     description: tokenizer digest, splits, sources, shards with counts; checksums of all files
tokenizer/        the tokenizer
*.arrayrecord     one record per document: its token ids as little-endian integers
*.lengths.npy     number of tokens of each document
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from etils import epath
from pydantic import BaseModel, Field

from llmctl.config import checksums
from llmctl.config.containment import check as check_links
from llmctl.config.containment import within
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data.config import DataConfig, SourceConfig
from llmctl.data.paths import folder, is_local, keep_open
from llmctl.data.tokenizers.base import Tokenizer

DESCRIPTION = "prepared.json"
FORMAT = 1
ADVICE = "remove the folder and prepare the data again"


Dtype = Literal["<u2", "<u4"]
"""NumPy dtype of stored token ids."""


class Shard(BaseModel):
    """Describe one ArrayRecord file: its name, its counts, its size and its checksum."""

    file: str
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Part(BaseModel):
    """Describe the documents of one source in one split: the file names of the shards, in order, and the file of
    document lengths."""

    title: str
    weight: float = Field(gt=0, allow_inf_nan=False)
    epochs: float = Field(ge=0, allow_inf_nan=False)
    lengths: str
    """Name of the file with the number of tokens of each document."""
    lengths_sha256: str = ""
    """Checksum of the file `lengths`; empty if an earlier version of llmctl prepared the data."""
    shards: list[Shard]


class Prepared(BaseModel):
    """Store the content of `prepared.json`."""

    format: int
    key: str
    """SHA-256 of everything that determines the content: data, settings and tokenizer."""
    tokenizer: str
    """Digest of the tokenizer that tokenized the data."""
    dtype: Dtype
    """NumPy dtype of the token ids in a record."""
    data: dict[str, Any]
    """Data config with which the data was prepared, as JSON data."""
    splits: dict[str, list[Part]]
    words: dict[str, str] | None = None
    """Checksums of the tokenizer's files by path; None if an earlier version of llmctl prepared the data."""
    digest: str = ""
    """SHA-256 of all fields above; empty if an earlier version of llmctl prepared the data."""

    def documents(self, split: str) -> int:
        """Return the number of documents of a split."""
        return sum(s.documents for part in self.splits[split] for s in part.shards)

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split, without beginning-of-sequence and end-of-sequence tokens."""
        return sum(s.tokens for part in self.splits[split] for s in part.shards)

    def text(self) -> str:
        """Return the content of `prepared.json`, including the digest of the other fields."""
        values = self.model_dump(mode="json", exclude={"digest"})
        return json.dumps(values | {"digest": checksums.of_json(values)}, indent=1) + "\n"


def read(path: str) -> tuple[epath.Path, Prepared]:
    """Read the description of prepared data at `path`, and return its folder and the description.

    Raises:
        RequestError: If there is no prepared data. If the data is damaged. If the data's format is later than `FORMAT`.
    """
    where = folder(path)
    if not (where / DESCRIPTION).exists():
        raise RequestError(f"{path}: no prepared data there (no {DESCRIPTION}); llmctl prepare makes it")
    check_links(where)
    try:
        values = parse_json(within(where, DESCRIPTION).read_bytes())
        digest = values.pop("digest", "")
        # as it is in the file, so that fields of later versions do not matter
        whole = not digest or digest == checksums.of_json(values)
        found = Prepared.model_validate(values | {"digest": digest})
    except (ValueError, TypeError, AttributeError):
        raise RequestError(f"{where / DESCRIPTION}: damaged; {ADVICE}") from None
    if found.format > FORMAT:
        raise RequestError(f"{path}: prepared by a newer llmctl (format {found.format}, this one reads {FORMAT})")
    if not whole:
        raise RequestError(f"{where / DESCRIPTION}: does not match what was saved; {ADVICE}")
    return where, found


class Shards:
    """Give random access to documents in ArrayRecord files (shards). This class has the interface of
    `corpus.Documents`."""

    def __init__(self, where: epath.Path, part: Part, dtype: str):
        """Check the shards and read the document lengths.

        Raises:
            RequestError: If a shard is missing or outside the folder, or if its size differs from the description.
        """
        self._files = [within(where, s.file) for s in part.shards]
        keep_open(len(self._files))  # the files that are read stay open
        for file, shard in zip(self._files, part.shards, strict=True):
            if not file.exists() or file.stat().length != shard.bytes:
                raise RequestError(f"{file}: missing or damaged; {ADVICE}")
        if wrong := _wrong_lengths(where, part):
            raise RequestError(f"{where / wrong}; {ADVICE}")
        try:
            with within(where, part.lengths).open("rb") as stream:
                lengths = np.load(stream, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError):
            raise RequestError(f"{where / part.lengths}: damaged; {ADVICE}") from None
        documents, tokens = (sum(getattr(s, name) for s in part.shards) for name in ("documents", "tokens"))
        whole = lengths.dtype.kind in "iu" and lengths.shape == (documents,)
        if not whole or (lengths < 0).any() or lengths.sum(dtype=np.int64) != tokens:
            raise RequestError(f"{where / part.lengths}: damaged; {ADVICE}")
        self._lengths = lengths.astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._dtype = dtype

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, int64 [D]."""
        return self._lengths

    @property
    def tokens(self) -> Shards:
        """Return this object. When it is indexed with token positions, it returns token ids."""
        return self

    def __getitem__(self, at_N: np.ndarray) -> np.ndarray:
        """Return the token ids at the positions `at_N`, int32 [N]. Each document is read once."""
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
        try:
            records = [self._data[d] for d in docs] if is_local(self._files[0]) else self._data.__getitems__(docs)
        except (RuntimeError, ValueError, IndexError) as e:  # the format has a checksum of every record
            raise RequestError(f"{self._files[0].parent}: damaged ({' '.join(str(e).split())[:200]}); {ADVICE}") from e
        try:
            documents = [np.frombuffer(r, self._dtype) for r in records]
        except ValueError as e:
            raise RequestError(f"{self._files[0].parent}: damaged ({e}); {ADVICE}") from None
        for d, document in zip(docs, documents, strict=True):
            if len(document) != self._lengths[d]:
                raise RequestError(f"{self._files[0].parent}: document {d} is damaged; {ADVICE}")
        return documents

    @functools.cached_property
    def _data(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource([str(file) for file in self._files])


def check_words(where: epath.Path, found: Prepared) -> None:
    """Check that the tokenizer in a folder of prepared data is the tokenizer that tokenized the data.

    Raises:
        RequestError: If a file of the tokenizer differs.
    """
    for problem in _wrong_words(where, found):
        raise RequestError(f"{where / problem}; {ADVICE}")


def damage(where: epath.Path, found: Prepared) -> dict[str, str]:
    """Compare all files of prepared data, including the shards, with their checksums.

    Returns:
        One message per differing file, by file name.
    """
    wrong = [*_wrong_words(where, found)]
    for part in (part for parts in found.splits.values() for part in parts):
        wrong += filter(None, [_wrong_lengths(where, part)])
        for shard in part.shards:
            file = within(where, shard.file)
            if not file.exists():
                wrong.append(f"{shard.file} is missing")
            elif checksums.of_file(file) != shard.sha256:
                wrong.append(f"{shard.file} does not match what was saved")
    return {clause.partition(" ")[0]: clause for clause in wrong}


def _wrong_words(where: epath.Path, found: Prepared) -> Iterator[str]:
    if found.words is not None:
        for name, what in checksums.differing(where / "tokenizer", found.words).items():
            yield f"tokenizer/{name} {what}"


def _wrong_lengths(where: epath.Path, part: Part) -> str:
    file = within(where, part.lengths)
    if not file.exists():
        return f"{part.lengths} is missing"
    differs = part.lengths_sha256 and checksums.of_file(file) != part.lengths_sha256
    return f"{part.lengths} does not match what was saved" if differs else ""


def check_settings(found: Prepared, part: SourceConfig, cfg: DataConfig, path: str) -> None:
    """Check that filters, replacements, deduplication and split fractions are the same as when the data was prepared.

    Only `llmctl prepare` applies these settings. Training on prepared data cannot change these settings.

    Args:
        found: Description of the prepared data.
        part: Settings of the source.
        cfg: Settings of the data.
        path: Folder of the prepared data, for the error message.

    Raises:
        RequestError: If one of these settings differs.
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
    """Check that the data was prepared with `tokenizer`.

    Raises:
        RequestError: If the data was prepared with another tokenizer.
    """
    if found.tokenizer != tokenizer.digest:
        raise RequestError(
            f"{path}: prepared with another tokenizer ({found.tokenizer[:12]}) than the model's "
            f"({tokenizer.digest[:12]}); prepare it with tokenizer.path = the model's tokenizer"
        )
