"""Tokenize a corpus once, in parallel processes, and save the tokens as shards (files of documents) for training.

The index of a document in its source determines its shard, and each shard is written by one process. The result is
therefore the same for any number of processes. If a preparation is interrupted, the next preparation writes only the
missing shards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from llmctl.config import checksums, containment
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.dedup import Scan, scan
from llmctl.data.pretraining.prepare_workers import Pool, Worker, processes
from llmctl.data.pretraining.prepared import (
    DESCRIPTION,
    FORMAT,
    Dtype,
    Part,
    Prepared,
    Shard,
    Shards,
    check_words,
    read,
)
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.distributed import locks

Progress = Callable[[int, int], None]
"""Function that is called with (number of documents done, total number of documents)."""

MOST_SHARDS, LEAST_DOCUMENTS = 1024, 1024
"""Maximum number of shards per source and split, and minimum number of documents per shard except the last."""


@dataclass(frozen=True)
class PlannedShard:
    """Describe a shard (a file of documents) before it is written: its name and its documents."""

    name: str
    """File name of the shard without suffix."""
    index: np.ndarray
    """Row numbers of the shard's documents in the source."""


class ShardRecord(BaseModel):
    """Describe a shard (a file of documents) that was written.

    The record is saved next to the shard, so that a later preparation does not write the shard again.
    """

    shard: Shard
    lengths: str
    """Checksum of the file that contains the lengths of the documents."""


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    out: Path,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Tokenize a corpus, write it to the folder `out`, and return the description of the folder.

    `llmctl.data.pretraining.prepared` describes the files. The files are first written to a hidden folder next to
    `out`. When the hidden folder is complete, it is renamed to `out`.

    Args:
        data: Settings of the data.
        tokenizer: Settings of the tokenizer to load or train.
        out: Output folder.
        workers: Number of processes.
        progress: Function that is called with the number of documents done and their total.
        say: Function that is called with one-line messages.

    Raises:
        RequestError: If the data or the tokenizer is invalid, or if `out` contains other files.
        Interrupted: If the user presses Ctrl-C. A later call with the same arguments resumes.
    """
    if any(part.source == "prepared" for part in data.parts()):
        raise RequestError("the data is prepared already")
    work = locks.scratch(out, "prepare")
    with locks.claim(out), processes(data, work, workers) as pool:
        return _prepare(data, tokenizer, out, work, pool, progress, say)


def _prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    out: Path,
    work: Path,
    pool: Pool,
    progress: Progress,
    say: Callable[[str], None],
) -> Prepared:
    text = splits.load(data, lambda ranges: pool(_scan, ranges), labels=False)
    if "text" not in text["train"].columns:
        raise RequestError(
            "prepare takes text for language modelling: map data.columns.text; other tasks read raw data"
        )
    key = _key(data, tokenizer, text)
    where, found = read(str(out)) if (out / DESCRIPTION).exists() else (None, None)
    if where and found and found.key == key:
        for part in (part for parts in found.splits.values() for part in parts):
            Shards(where, part, found.dtype)  # compares sizes and lengths
        check_words(where, found)
        say(f"{out}: up to date, skipped")
        return found
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: is there already, with something else; move it away or choose another folder")
    say(f"{data.title}: {text.describe()}")
    words = _begin(work, key, tokenizer, text, say)
    plan = {split: list(_planned_shards(split, examples)) for split, examples in text.examples.items()}
    _write(
        work,
        [planned for parts in plan.values() for _, planned_shards in parts for planned in planned_shards],
        pool,
        progress,
    )
    described = Prepared(
        format=FORMAT,
        key=key,
        tokenizer=words.digest,
        dtype=_dtype(words),
        data=keyed(data),
        splits={
            split: [_part(work, data, p, split, planned_shards) for p, planned_shards in parts]
            for split, parts in plan.items()
        },
        words=checksums.of_folder(work / "tokenizer"),
    )
    for scrap in (*work.glob("*.shard.json"), *work.glob("*.shard.npy"), work / "key"):
        scrap.unlink()
    (work / DESCRIPTION).write_text(described.text())
    if out.exists():
        out.rmdir()
    work.rename(out)
    return described


def _key(data: DataConfig, tokenizer: TokenizerConfig, text: splits.Splits) -> str:
    files = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in tokenizer.inputs()]
    digests = {name: examples.digest for name, examples in text.examples.items()}
    decides = [FORMAT, keyed(data), keyed(tokenizer), files, digests]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _begin(work: Path, key: str, cfg: TokenizerConfig, text: splits.Splits, say: Callable[[str], None]) -> Tokenizer:
    """Create the temporary folder of a preparation, and a tokenizer in it.

    If an earlier call with the same settings created the folder, the tokenizer in the folder is loaded.

    Args:
        work: Temporary folder.
        key: Hash of everything that determines the result.
        cfg: Settings of the tokenizer.
        text: Splits of the raw text, from which a tokenizer may be trained.
        say: Function that is called with one-line messages.

    Returns:
        The tokenizer.
    """
    containment.check(work)
    note = work / "key"
    said = f"{key} {checksums.of_json(checksums.of_folder(work / 'tokenizer'))}"
    if work.exists() and not (note.exists() and note.read_text() == said):
        say(f"{work}: left by other settings, discarded")
        shutil.rmtree(work)
    if not work.exists():
        words = tokenizers.load_or_train(text["train"].sample_chars(cfg.sample).texts(), cfg)
        words.save(work / "tokenizer")
        # written last, so its presence marks a complete tokenizer
        note.write_text(f"{key} {checksums.of_json(checksums.of_folder(work / 'tokenizer'))}")
    return tokenizers.load(work / "tokenizer")


def _planned_shards(split: str, examples: splits.Examples) -> Iterator[tuple[int, list[PlannedShard]]]:
    """Yield (index of the source, shards to write) for each source that has documents in a split."""
    for p, part in examples.parts():
        size = max(LEAST_DOCUMENTS, -(-len(part) // MOST_SHARDS))
        cuts = range(0, len(part), size)
        yield (
            p,
            [
                PlannedShard(f"{split}-{p}-{k:05}-of-{len(cuts):05}", part.index[at : at + size])
                for k, at in enumerate(cuts)
            ],
        )


def _part(work: Path, data: DataConfig, p: int, split: str, planned_shards: list[PlannedShard]) -> Part:
    lengths = f"{split}-{p}.lengths.npy"
    np.save(
        work / lengths,
        np.concatenate([np.load(_lengths(work, planned), allow_pickle=False) for planned in planned_shards]),
    )
    source = data.sources()[p]
    shards = [ShardRecord.model_validate_json(_note(work, planned).read_text()).shard for planned in planned_shards]
    about = {"title": source.title, "weight": source.weight, "epochs": source.epochs, "shards": shards}
    return Part(lengths=lengths, lengths_sha256=checksums.of_file(work / lengths), **about)


def _write(work: Path, planned_shards: list[PlannedShard], pool: Pool, progress: Progress) -> None:
    """Write the shards that are missing in the folder `work`."""
    missing = [planned for planned in planned_shards if not _is_written(work, planned)]
    total = sum(len(planned.index) for planned in planned_shards)
    done = total - sum(len(planned.index) for planned in missing)
    progress(done, total)
    for documents in pool(_shard, missing):
        progress(done := done + documents, total)


def _is_written(work: Path, planned: PlannedShard) -> bool:
    """Return True if an earlier call wrote a shard and its document lengths, and both files match their checksums."""
    try:
        note = ShardRecord.model_validate_json(_note(work, planned).read_text())
        sums = checksums.of_file(work / note.shard.file), checksums.of_file(_lengths(work, planned))
    except (OSError, ValueError):
        return False
    return sums == (note.shard.sha256, note.lengths)


def _note(work: Path, planned: PlannedShard) -> Path:
    return work / f"{planned.name}.shard.json"


def _lengths(work: Path, planned: PlannedShard) -> Path:
    return work / f"{planned.name}.shard.npy"


def _scan(worker: Worker, rows: splits.Range) -> Scan:
    part, first, last = rows
    return scan(worker.data, worker.views[part], first, last)


def _shard(worker: Worker, planned: PlannedShard) -> int:
    """Write one shard, its document lengths and its `ShardRecord`, and return the number of documents.

    The record is written last, so that its presence marks a complete shard.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    file = worker.work / f"{planned.name}.arrayrecord"
    dtype = _dtype(worker.tokenizer)
    writer = ArrayRecordWriter(str(file), "group_size:1")
    lengths = []
    for i in planned.index:
        ids = np.array(worker.tokenizer.encode(worker.source[int(i)]["text"]), dtype)
        writer.write(ids.tobytes())
        lengths.append(len(ids))
    writer.close()
    np.save(_lengths(worker.work, planned), np.array(lengths, np.int32), allow_pickle=False)
    content = file.read_bytes()
    shard = Shard(
        file=file.name,
        documents=len(lengths),
        tokens=sum(lengths),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    draft = _note(worker.work, planned).with_suffix(".tmp")
    draft.write_text(
        ShardRecord(shard=shard, lengths=checksums.of_file(_lengths(worker.work, planned))).model_dump_json()
    )
    draft.rename(_note(worker.work, planned))
    return len(lengths)


def _dtype(tokenizer: Tokenizer) -> Dtype:
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
