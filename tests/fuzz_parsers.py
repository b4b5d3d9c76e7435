"""Table of every parser of files and texts that others make: a valid input, how to change it, and what reads it.

A parser returns, or refuses its input in one line with exit code 2. `tests/fuzz_coverage.py` searches for inputs that
do neither, guided by coverage; `tests/cli/test_fuzz_parsers.py` reads random changes.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_inputs
import numpy as np
from valid_inputs import Valid

from llmctl.artifacts import artifact
from llmctl.artifacts.artifact import Artifact
from llmctl.cli import app, model_sizes, summary, verification
from llmctl.cli.commands import generate
from llmctl.config.text_input import check_unicode
from llmctl.convert import gguf, hf_folder, peft
from llmctl.convert import tokenizers as brought
from llmctl.data import row_stream, splits
from llmctl.data.config import DataConfig, SourceConfig
from llmctl.data.pretraining import prepared
from llmctl.data.source import open_source
from llmctl.data.tokenizers import loading
from llmctl.model import size_report
from llmctl.model.generate import chat, chat_template, continuations
from llmctl.pipeline import console, recipe
from llmctl.plan import topologies

SECONDS, MEMORY = 20, 2 << 30
"""Limits of one input: processor time, and growth of the process's memory in bytes."""
TEXT = "a b \u00e9 </s> 12"


@dataclass(frozen=True)
class Parser:
    """A valid input, and what reads a changed copy of it."""

    source: Path
    """A file, or a folder."""
    inner: str
    """The file of the folder that is changed; empty if the source is the file."""
    change: fuzz_inputs.Change
    read: Callable[[Path], Any]

    @property
    def valid(self) -> bytes:
        """Return the bytes that are changed."""
        return (self.source / self.inner if self.inner else self.source).read_bytes()

    def target(self, folder: Path) -> Path:
        """Copy the source into a folder, and return the copy."""
        target = folder / self.source.name
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.source, target) if self.source.is_dir() else shutil.copy(self.source, target))

    def put(self, target: Path, data: bytes) -> None:
        """Write changed bytes into a copy of the source."""
        (target / self.inner if self.inner else target).write_bytes(data)


def judge(read: Callable[[], Any]) -> str:
    """Return "read" or "refused".

    Raises:
      AssertionError: the input had another ending, took too long or took too much memory.
    """
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = "read"
    try:
        read()
    except BaseException as e:
        code, line = app.error_result(e)
        if code != 2 or "LLMCTL_DEBUG" in line or not line.strip():
            raise AssertionError(f"exit {code}: {' '.join(line.split())[:300]}") from e
        outcome = "refused"
    took = time.process_time() - begun
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert took < SECONDS, f"{took:.0f} seconds"
    assert grew < MEMORY, f"{grew / 2**30:.1f} GiB"
    return outcome


def parsers(valid: Valid) -> dict[str, Parser]:
    """Return every parser, by name."""
    base = artifact.load(valid / "art")
    text, octets = fuzz_inputs.text, fuzz_inputs.octets
    unsummed(valid / "art", valid / "unsummed")
    unsummed(valid / "run" / "pretrain", valid / "run" / "pretrain")
    table: dict[str, tuple[str, str, fuzz_inputs.Change, Callable[[Path], Any]]] = {
        "recipe": ("r.toml", "", fuzz_inputs.toml, recipe.read),
        "--set": ("set.txt", "", fuzz_inputs.toml, lambda p: _set(valid, p)),
        "model.toml": ("model.toml", "", fuzz_inputs.toml, lambda p: size_report.report(model_sizes.model(str(p)), 0)),
        "topology": ("topology.txt", "", octets, lambda p: topologies.find(_argument(p))),
        "manifest": ("unsummed", "manifest.json", text, artifact.abstract),
        "manifest with checksums": ("art", "manifest.json", text, _verified),
        "manifest shown": ("run", "pretrain/manifest.json", text, _shown),
        "results.json": ("run", "eval/results.json", text, _shown),
        "config.json": ("hf", "config.json", text, hf_folder.inspect),
        "config.json of BERT": ("embedder", "config.json", text, hf_folder.inspect),
        "pooling": ("embedder", "1_Pooling/config.json", text, hf_folder.inspect),
        "compressed-tensors": ("packed", "config.json", text, _weights),
        "packed tensors": ("packed", "model.safetensors", fuzz_inputs.safetensors, _weights),
        "safetensors": ("hf", "model.safetensors", fuzz_inputs.safetensors, _weights),
        "index": ("shards", "model.safetensors.index.json", text, hf_folder.inspect),
        "gguf": ("model.gguf", "", fuzz_inputs.head, _gguf),
        "gguf weights": ("model.gguf", "", fuzz_inputs.ends, _gguf),
        "adapter_config": ("peft", "adapter_config.json", text, lambda p: peft.load(base, p)),
        "adapter": ("peft", "adapter_model.safetensors", fuzz_inputs.safetensors, lambda p: peft.load(base, p)),
        "tokenizer.json": ("foreign", "tokenizer.json", text, lambda p: _words(p, base)),
        "tokenizer_config": ("foreign", "tokenizer_config.json", text, lambda p: _words(p, base)),
        "special_tokens_map": ("foreign", "special_tokens_map.json", text, lambda p: _words(p, base)),
        "generation_config": ("foreign", "generation_config.json", text, lambda p: _words(p, base)),
        "chat template": ("foreign", "chat_template.jinja", fuzz_inputs.jinja, _chat),
        "descriptor": ("words", loading.DESCRIPTOR, text, lambda p: _words(p, base)),
        "sentencepiece": ("pieces.model", "", fuzz_inputs.pieces, lambda p: _words(p, base)),
        "sentencepiece's config": ("pieces", "tokenizer_config.json", text, lambda p: _words(p, base)),
        "vocab.json": ("old", "vocab.json", text, lambda p: _brought(p, base)),
        "merges.txt": ("old", "merges.txt", octets, lambda p: _brought(p, base)),
        "vocab.txt": ("older", "vocab.txt", octets, lambda p: _brought(p, base)),
        "older config": ("older", "tokenizer_config.json", text, lambda p: _brought(p, base)),
        "messages": ("talk.json", "", text, chat.read_conversation),
        "prompts": ("prompts.jsonl", "", fuzz_inputs.lines, lambda p: generate._texts([], p)),
        "jsonl": ("rows.jsonl", "", fuzz_inputs.lines, _table),
        "csv": ("rows.csv", "", octets, _table),
        "text": ("rows.txt", "", octets, _table),
        "gzip": ("rows.jsonl.gz", "", fuzz_inputs.packed, _table),
        "zstd": ("rows.jsonl.zst", "", octets, _table),
        "parquet": ("rows.parquet", "", fuzz_inputs.ends, _table),
        "arrow": ("hf_data", "data.arrow", octets, _table),
        "state.json": ("hf_data", "state.json", text, _table),
        "dataset_info": ("hf_data", "dataset_info.json", text, _table),
        "dataset_dict": ("hf_splits", "dataset_dict.json", text, _table),
        "prepared": ("prepared", "prepared.json", text, _prepared),
        "lengths": ("prepared", _only(valid, "*.npy"), octets, _prepared),
        "shard": ("prepared", _only(valid, "*.arrayrecord"), octets, _prepared),
        **{
            f"predict {kind}": (f"rows.{kind}", "", change, lambda p, k=kind: _predicted(p, k))
            for kind, change in (("jsonl", fuzz_inputs.lines), ("csv", octets), ("text", octets))
        },
    }
    (valid / "set.txt").write_text("stage.1.sparsity=0.6")
    (valid / "topology.txt").write_text("2*v5e:4x4")
    shutil.copy(valid / "rows.txt", valid / "rows.text")
    shutil.copy(valid / "pieces" / "tokenizer.model", valid / "pieces.model")
    if (valid / "tfds").is_dir():
        at = "tiny/1.0.0"
        table |= {
            "features.json": ("tfds", f"{at}/features.json", text, _tfds),
            "tfds info": ("tfds", f"{at}/dataset_info.json", text, _tfds),
            "array_record": ("tfds", f"{at}/tiny-train.array_record-00000-of-00001", octets, _tfds),
        }
    return {name: Parser(valid / source, *rest) for name, (source, *rest) in table.items()}


def unsummed(source: Path, target: Path) -> None:
    """Write an artifact without checksums, as an earlier llmctl did, so that fields are parsed, not only compared."""
    made = artifact.read_manifest(source).model_copy(update={"checksums": None})
    if source != target:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("params"))
    (target / "manifest.json").write_text(made.model_dump_json(indent=1))


def _only(valid: Valid, pattern: str) -> str:
    return next(iter(sorted(p.name for p in (valid / "prepared").glob(pattern))))


def _argument(path: Path) -> str:
    return check_unicode(path.read_bytes().decode(errors="surrogateescape"), "argument 1")


def _set(valid: Valid, path: Path) -> None:
    recipe.read(valid / "r.toml", None, [_argument(path)])


def _verified(path: Path) -> None:
    artifact.abstract(path)
    verification.run(path, lambda _: None)


def _shown(path: Path) -> None:
    found = summary.run(path)
    with contextlib.redirect_stdout(io.StringIO()):
        console.show(summary.table(found["artifacts"], str(path)))
        console.result(found)
        summary.one(path / "pretrain")


def _weights(path: Path) -> None:
    found = hf_folder.inspect(path)
    for name in found.wanted:
        found.tensors[name].read()


def _gguf(path: Path) -> None:
    found = gguf.inspect(path)
    for name in found.wanted:
        found.tensors[name].read()
    work = path.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    loading.load(gguf.tokenizer(path, work)).encode(TEXT)


def _words(path: Path, base: Artifact) -> None:
    words = loading.load(path)
    words.decode(words.encode(TEXT))
    words.encode_batch([TEXT, ""])
    words.offsets([TEXT])
    words.pieces()
    words.prompt(TEXT)
    if path.is_dir():
        continuations.end_ids(path, words)
    _brought(path, base)


def _brought(path: Path, base: Artifact) -> None:
    work = path.parent / "brought"
    shutil.rmtree(work, ignore_errors=True)
    for more in ({}, {"head": "classify", "labels": 2}):
        found = brought._find(path)
        if found and brought.import_tokenizer(
            path, work, base.model.model_copy(update=more | {"vocab_size": found.vocab_size})
        ):
            loading.load(work).encode(TEXT)


def _chat(path: Path) -> None:
    words = loading.load(path)
    template = chat_template.Template(loading.chat_template(path), words)
    template.prompt([{"role": "user", "content": "hi </s>"}, {"role": "assistant", "content": "a"}])


def _table(path: Path) -> None:
    kind = "hf" if path.is_dir() else re.sub(r"txt", "text", path.suffixes[0][1:])
    for documents in ("file", "line") if kind == "text" else ("file",):
        list(open_source(SourceConfig(source=kind, path=str(path), documents=documents)))
        cfg = DataConfig(source=kind, path=str(path), documents=documents, validation=0.2, test=0.2)
        splits.load(cfg, labels=kind != "text")


def _tfds(path: Path) -> None:
    list(open_source(SourceConfig(source="tfds", name="tiny", data_dir=str(path))))
    splits.load(DataConfig(source="tfds", name="tiny", data_dir=str(path), validation=0.2, test=0.2))


def _prepared(path: Path) -> None:
    where, found = prepared.read(str(path))
    prepared.check_words(where, found)
    for parts in found.splits.values():
        for part in parts:
            shards = prepared.Shards(where, part, found.dtype)
            shards[np.arange(min(shards.lengths.sum(), 10_000))]
    prepared.damage(where, found)


def _predicted(path: Path, kind: str) -> None:
    with path.open("rb") as stream:
        list(row_stream.rows(stream, "in", kind, {}))


def changed(parser: Parser, seed: int) -> bytes:
    """Return the valid bytes of a parser, changed at random by a seed."""
    return parser.change(random.Random(seed), parser.valid)
