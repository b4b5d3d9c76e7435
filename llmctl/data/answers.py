"""Store the answers that a teacher generates to prompts, as JSON lines. The files are also a data set.

A folder of answers contains:

- `answers.json`: the settings that determine the answers
- `NAME-00000.jsonl`: one line per prompt, {"row": number, "prompt": text, "completion": text}
- `NAME-00000.json`: description of `NAME-00000.jsonl`, written last, with numbers of lines and tokens and a checksum

If writing is interrupted, the next writer replaces the file that has no description. The setting
`data.path = "FOLDER/train-*.jsonl"` reads the answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from llmctl.config import checksums, containment
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data.source import Row, Source
from llmctl.data.splits import Examples

DESCRIPTION = "answers.json"
ADVICE = "remove the folder and run the stage again"


class Shard(BaseModel):
    """Describe one file of answers."""

    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    """Number of tokens that the teacher generated."""
    cut: int = Field(ge=0)
    """Number of answers that reached the maximum number of tokens."""
    sha256: str


class AnswerFiles:
    """Read and write the files of one split's answers."""

    def __init__(self, folder: Path, split: str) -> None:
        """Read the descriptions of all files of the split.

        Raises:
            RequestError: If a file is missing or damaged.
        """
        self.folder, self.split = folder, split
        self.shards: list[Shard] = []
        self._texts: list[str] = []
        while (note := self._path(len(self.shards), ".json")).is_file():
            try:
                shard = Shard.model_validate_json(containment.within(folder, note.name).read_bytes())
                content = containment.within(folder, self._path(len(self.shards), ".jsonl").name).read_bytes()
            except (OSError, ValueError):
                raise RequestError(f"answers: {note}: damaged; {ADVICE}") from None
            lines = content.splitlines()
            if hashlib.sha256(content).hexdigest() != shard.sha256 or len(lines) != shard.rows:
                raise RequestError(f"answers: {note.with_suffix('.jsonl')}: does not match what was saved; {ADVICE}")
            try:
                self._texts += [_completion(line, len(self._texts) + i) for i, line in enumerate(lines)]
            except ValueError:
                raise RequestError(f"answers: {note.with_suffix('.jsonl')}: damaged; {ADVICE}") from None
            self.shards.append(shard)

    @property
    def texts(self) -> Sequence[str]:
        """Return the stored answers, in the order of the prompts."""
        return self._texts

    def add(self, prompts: Sequence[str], completions: Sequence[str], tokens: int, cut: int, write: bool) -> None:
        """Append one answer per prompt to the stored answers.

        Args:
            prompts: Prompts that follow the prompts with stored answers.
            completions: Answer to each prompt.
            tokens: Number of tokens that the teacher generated for these answers.
            cut: Number of these answers that reached the maximum number of tokens.
            write: Whether to write these answers to a new file. Otherwise they are only kept in memory.
        """
        first, rows = len(self._texts), zip(prompts, completions, strict=True)
        values = [{"row": first + i, "prompt": p, "completion": c} for i, (p, c) in enumerate(rows)]
        content = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
        shard = Shard(rows=len(values), tokens=tokens, cut=cut, sha256=hashlib.sha256(content).hexdigest())
        if write:
            file, note = (self._path(len(self.shards), suffix) for suffix in (".jsonl", ".json"))
            containment.own(file).write_bytes(content)
            draft = containment.own(note.with_suffix(".draft"))
            draft.write_text(shard.model_dump_json())
            draft.replace(note)
        self.shards.append(shard)
        self._texts += completions

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / f"{self.split}-{shard:05}{suffix}"


def _completion(line: bytes, row: int) -> str:
    value = parse_json(line)
    if not isinstance(value, dict) or value.get("row") != row or not isinstance(value.get("completion"), str):
        raise ValueError("not an answer")
    return value["completion"]


def described(folder: Path) -> dict[str, Any] | None:
    """Return the settings that determine the answers in a folder, by name. If the folder is missing or empty, return
    None.

    Raises:
        RequestError: If the folder has other content, or is damaged.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    containment.check(folder)
    file = folder / DESCRIPTION
    if not file.is_file():
        raise RequestError(f"answers: {folder}: is there already, with something else; choose another folder")
    try:
        values = parse_json(file.read_bytes())
        made_for = values["made_for"]
        whole = isinstance(made_for, dict) and values["digest"] == checksums.of_json(made_for)
    except (OSError, ValueError, TypeError, KeyError):
        whole, made_for = False, None
    if not whole:
        raise RequestError(f"answers: {file}: damaged; {ADVICE}")
    return made_for


def describe(folder: Path, made_for: Mapping[str, Any]) -> None:
    """Write the settings that determine the answers in a folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = containment.own(folder / f"{DESCRIPTION}.draft")
    draft.write_text(json.dumps({"made_for": dict(made_for), "digest": checksums.of_json(dict(made_for))}, indent=1))
    draft.replace(folder / DESCRIPTION)


class AnsweredSource(Source):
    """Read the rows of a source, with a teacher's answer in place of each completion."""

    def __init__(self, source: Source, answers: Mapping[int, str]) -> None:
        self._source, self._answers = source, answers
        self.columns = tuple(dict.fromkeys((*source.columns, "completion")))
        self.names = source.names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Row:
        return {**self._source[i], "completion": self._answers[i]}

    def where(self, i: int) -> str:
        """Return the location of a row for error messages."""
        return self._source.where(i)


def answered(examples: Examples, answers: Sequence[str]) -> Examples:
    """Return the examples with the given answers, one per example, as their completions. Examples with a blank answer
    are dropped."""
    found = dict(zip(map(int, examples.index), answers, strict=True))
    texts = zip(examples.texts("prompt"), answers, strict=True)
    digests = [hashlib.sha256("\0".join(pair).encode()).digest()[:16] for pair in texts]
    whole = dataclasses.replace(
        examples,
        source=AnsweredSource(examples.source, found),
        columns=tuple(dict.fromkeys((*examples.columns, "completion"))),
        digests=np.frombuffer(b"".join(digests), "S16"),
    )
    return whole.take(np.flatnonzero([bool(text.strip()) for text in answers]))
