"""Store a teacher's outputs for rows in ArrayRecord files, and read them as arrays of a batch.

A folder of outputs contains:

- `cache.json`: the settings that determine the outputs, and the metrics of the teachers
- `NAME-00000.arrayrecord`: one record per row, with a fingerprint of the row and the teacher's outputs for the row
- `NAME-00000.json`: description of `NAME-00000.arrayrecord`, written last, with keys of the rows, size and checksum

Files are never changed, only added. If writing is interrupted, the next writer replaces the file that has no
description.

Arrays of predicted positions are stored only at positions with a loss weight above 0. The sizes, fingerprints, ids and
values that are read are checked.

Shapes: B rows, P predicted positions per row, n positions with a loss weight above 0, k listed tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from llmctl.config import checksums, containment
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data.paths import keep_open

Batch = dict[str, np.ndarray]

DESCRIPTION = "cache.json"
FORMAT = 1
ADVICE = "remove the folder and run the stage again"
LABELS = frozenset({"label", "next_label", "targets", "start", "end", "row_weight", "example"})
"""Names of batch arrays that a teacher does not read. A row's fingerprint does not include these arrays."""
PER_POSITION = ("teacher_ids", "teacher_log_p", "teacher_rest")
"""Name endings of arrays [B, P, ...] that are stored only at positions with a loss weight above 0."""
IDS = "teacher_ids"
FINGERPRINT = 8
"""Size of a row's fingerprint in bytes."""
SLACK = 1e-3
"""Largest accepted difference between 1 and a sum of stored probabilities."""


@dataclass(frozen=True)
class Layout:
    """Describe the arrays in the record of one row: their names, shapes and dtypes."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each array in one row, by name, such as (P, k): P predicted positions, k listed tokens."""
    vocab: int = 0
    """Number of tokens of the vocabulary. All stored ids are smaller."""

    def stored(self, name: str) -> np.dtype[Any]:
        """Return the dtype with which the array `name` is stored in a record."""
        return np.dtype(("<u2" if self.vocab <= 2**16 else "<u4") if name.endswith(IDS) else "<f4")

    def row_bytes(self, positions: int | None = None) -> int:
        """Return the size of a row's record in bytes.

        Args:
            positions: Number of positions with a loss weight above 0; by default all P positions.
        """
        total = FINGERPRINT
        for name, shape in self.shapes.items():
            if name.endswith(PER_POSITION) and positions is not None:
                shape = (positions, *shape[1:])
            total += int(np.prod(shape)) * self.stored(name).itemsize
        return total

    def encode(self, arrays: Mapping[str, np.ndarray], row: Batch) -> bytes:
        """Return the record of one row.

        Args:
            arrays: Arrays of the teacher's outputs for the row.
            row: Arrays of the row itself, such as its tokens and loss weights.
        """
        kept, parts = counted(row), [fingerprint(row)]
        for name in sorted(self.shapes):
            a = arrays[name][kept] if name.endswith(PER_POSITION) else arrays[name]
            parts.append(np.ascontiguousarray(a, self.stored(name)).tobytes())
        return b"".join(parts)

    def decode(self, record: bytes, row: Batch) -> Batch:
        """Return the arrays of a record, with zeros at positions that are not stored.

        Raises:
            ValueError: If the record belongs to another row, or contains invalid values.
        """
        if record[:FINGERPRINT] != fingerprint(row):
            raise ValueError("it belongs to another row")
        kept = counted(row)
        positions = int(np.count_nonzero(kept)) if kept is not None else None
        if len(record) != self.row_bytes(positions):
            raise ValueError(f"{len(record)} bytes, not {self.row_bytes(positions)}")
        found, at = {}, FINGERPRINT
        for name in sorted(self.shapes):
            shape, dtype = self.shapes[name], self.stored(name)
            if inside := name.endswith(PER_POSITION):
                shape = (positions or 0, *shape[1:])
            count = int(np.prod(shape))
            a = np.frombuffer(record, dtype, count, at).reshape(shape)
            at += count * dtype.itemsize
            found[name] = a.astype(np.int32 if name.endswith(IDS) else np.float32)
            if inside:
                full = np.zeros(self.shapes[name], found[name].dtype)
                full[kept] = found[name]
                found[name] = full
        self._check(found, kept)
        return found

    def _check(self, found: Batch, kept: np.ndarray | None) -> None:
        """Check that token ids are ascending and in the vocabulary, and that probabilities add up to 1.

        Raises:
            ValueError: If a value is invalid.
        """
        for name, a in found.items():
            if not np.isfinite(a).all():
                raise ValueError("a value is not finite")
            if not name.endswith(IDS) or kept is None:
                continue
            ids = a[kept]
            if ids.size and (ids.max() >= self.vocab or (np.diff(ids, axis=-1) <= 0).any()):
                raise ValueError("ids are not ascending tokens of the vocabulary")
            log_p, rest = (found[name.removesuffix(IDS) + other][kept] for other in PER_POSITION[1:])
            with np.errstate(over="ignore", under="ignore"):
                total = np.exp(log_p.astype(np.float64)).sum(-1) + np.exp(rest.astype(np.float64))
            if (np.abs(total - 1) > SLACK).any():
                raise ValueError("probabilities do not add up to 1")


def counted(row: Batch) -> np.ndarray | None:
    """Return a mask of the predicted positions with a loss weight above 0, bool [P]. If the row has no loss weights,
    return None."""
    if "weights" not in row:
        return None
    weights = row["weights"][row["places"]] if "places" in row else row["weights"]
    return weights > 0


def fingerprint(row: Batch) -> bytes:
    """Return a hash of a row, over the arrays that a teacher reads (all except `LABELS`)."""
    total = hashlib.blake2b(digest_size=FINGERPRINT)
    for name in sorted(row.keys() - LABELS):
        total.update(f"{name}{row[name].shape}".encode())
        total.update(np.ascontiguousarray(row[name]).data)
    return total.digest()


class Shard(BaseModel):
    """Describe one ArrayRecord file: the keys of its rows in order, its size and its checksum."""

    numbers: list[Annotated[int, Field(ge=0, lt=2**63)]]
    bytes: int = Field(ge=0)
    sha256: str
    tokens: int | None = None
    """Number of tokens that a teacher read in these rows. Files of earlier versions have no such number."""


class Description(BaseModel):
    """Store the content of `cache.json`."""

    format: int
    made_for: dict[str, Any]
    """Settings and digests that determine the outputs, by name, such as "teachers" and "temperature"."""
    judged: dict[str, Any] = {}
    """Metrics of the teachers on the validation rows, and the settings that determine these metrics."""
    digest: str = ""
    """SHA-256 of the fields above."""

    def text(self) -> str:
        """Return the content of `cache.json`, including the digest of the other fields."""
        values = self.model_dump(mode="json", exclude={"digest"})
        return json.dumps(values | {"digest": checksums.of_json(values)}, indent=1) + "\n"


def read(folder: Path) -> Description | None:
    """Return the description of the outputs in a folder. If the folder is missing or empty, return None.

    Raises:
        RequestError: If the folder has other content, is damaged, or has a later format.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    containment.check(folder)
    file = folder / DESCRIPTION
    if not file.is_file():
        raise RequestError(f"cache: {folder}: is there already, with something else; choose another folder")
    try:
        values = parse_json(file.read_bytes())
        whole = checksums.of_json({k: v for k, v in values.items() if k != "digest"}) == values.get("digest")
        found = Description.model_validate(values)
    except (OSError, ValueError, TypeError, AttributeError):
        raise RequestError(f"cache: {file}: damaged; {ADVICE}") from None
    if found.format > FORMAT:
        raise RequestError(f"cache: {folder}: written by a newer llmctl (format {found.format}, this reads {FORMAT})")
    if not whole:
        raise RequestError(f"cache: {file}: does not match what was saved; {ADVICE}")
    return found


def write(folder: Path, description: Description) -> None:
    """Write the description of a folder of outputs atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = containment.own(folder / f"{DESCRIPTION}.draft")
    draft.write_text(description.text())
    draft.replace(folder / DESCRIPTION)


class Records:
    """Give access to the stored outputs for one kind of rows (training or validation), by the key of a row. The key is
    a row number or the number of an example (`llmctl.data.taught_rows.numbers`).
    """

    def __init__(self, folder: Path, name: str, layout: Layout) -> None:
        """Read the descriptions of all files whose names begin with `name`.

        Args:
            folder: Folder of outputs, which may be missing.
            name: Beginning of the file names, such as "train".
            layout: Arrays of a record.

        Raises:
            RequestError: If a file is missing or damaged.
        """
        self.folder, self.name, self.layout = folder, name, layout
        self._shards: list[Shard] = []
        while (note := self._path(len(self._shards), ".json")).is_file():
            try:
                shard = Shard.model_validate_json(containment.within(folder, note.name).read_bytes())
            except (OSError, ValueError):
                raise RequestError(f"cache: {note}: damaged; {ADVICE}") from None
            file = self._path(len(self._shards), ".arrayrecord")
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise RequestError(f"cache: {file}: missing or damaged; {ADVICE}")
            self._shards.append(shard)
        numbers_R = np.array([n for shard in self._shards for n in shard.numbers], np.int64)
        self._order_R = np.argsort(numbers_R, kind="stable")
        self._sorted_R = numbers_R[self._order_R]

    @property
    def bytes(self) -> int:
        """Return the total size of the files in bytes."""
        return sum(shard.bytes for shard in self._shards)

    def has(self, numbers_N: np.ndarray) -> np.ndarray:
        """Return whether the outputs for each of the keys `numbers_N` are stored, bool [N]."""
        return np.isin(numbers_N, self._sorted_R)

    @property
    def tokens(self) -> int | None:
        """Return the number of tokens that a teacher read in all rows. If a file lacks this number, return None."""
        each = [shard.tokens for shard in self._shards]
        return None if None in each else sum(n for n in each if n)

    def add(self, numbers: Sequence[int], records: Sequence[bytes], tokens: int) -> None:
        """Write a new file of records, and then its description with the number of tokens in these rows."""
        from array_record.python.array_record_module import ArrayRecordWriter

        file, note = (self._path(len(self._shards), suffix) for suffix in (".arrayrecord", ".json"))
        writer = ArrayRecordWriter(str(containment.own(file)), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        shard = Shard(numbers=list(numbers), bytes=file.stat().st_size, sha256=checksums.of_file(file), tokens=tokens)
        draft = containment.own(note.with_suffix(".draft"))
        draft.write_text(shard.model_dump_json())
        draft.replace(note)
        self._shards.append(shard)

    def read(self, numbers_B: np.ndarray, batch: Batch) -> Batch:
        """Return the stored arrays of the rows of a batch, [B, ...].

        Args:
            numbers_B: Keys of the rows. The outputs for all these keys must be stored.
            batch: The same rows, without the teacher's outputs.

        Raises:
            RequestError: If a record is damaged, or belongs to another row.
        """
        at_B = self._order_R[np.searchsorted(self._sorted_R, numbers_B)]
        try:
            records = [self._data[int(at)] for at in at_B]
        except (RuntimeError, ValueError, IndexError) as e:  # the format has a checksum of every record
            raise RequestError(f"cache: {self.folder}: damaged ({' '.join(str(e).split())[:200]}); {ADVICE}") from e
        rows = []
        for b, record in enumerate(records):
            try:
                rows.append(self.layout.decode(record, {name: a[b] for name, a in batch.items()}))
            except ValueError as e:
                where = f"cache: {self.folder}: the record of {self.name} row {int(numbers_B[b])} is not usable"
                raise RequestError(f"{where} ({e}); {ADVICE}") from None
        return {name: np.stack([row[name] for row in rows]) for name in self.layout.shapes}

    @functools.cached_property
    def _data(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        files = [self._path(k, ".arrayrecord") for k in range(len(self._shards))]
        keep_open(len(files))  # the files that are read stay open
        return ArrayRecordDataSource([str(containment.within(self.folder, file.name)) for file in files])

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / f"{self.name}-{shard:05}{suffix}"
