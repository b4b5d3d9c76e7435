"""Read and write `manifest.json`: the metadata of an artifact, with checksums of its fields and files.

The content digest covers everything that can change an answer: each such field, the digest of the arrays, and the
tokenizer's files. It is compared at every read. The record digest covers the rest: metrics, lineage, sizes, logs.
`llmctl verify` compares both.

Example:
  >>> manifest = read_manifest(folder)
  >>> len(manifest.content), sorted(manifest.checksums.record.fields)[:3]
  (64, ['bits', 'bytes', 'config'])
  >>> damaged_fields(folder, "record"), damaged_files(folder, manifest, "content")
  ({}, {})
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from llmctl.artifacts.fingerprint import type_bits
from llmctl.config import checksums, containment
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.model.config import ModelConfig

FORMAT = 1
"""Version of the folder layout. A later version is refused."""

NAME = "manifest.json"
CONTENT = (
    *("family", "model", "labels", "task", "fitted", "pruned", "nonfinite", "digest", "tokenizer", "seq_len"),
    *("truncate", "weights"),
)
"""Fields that can change an answer, or the result of a later stage. The content digest covers them."""
TOKENIZER = "tokenizer"
"""Folder of the tokenizer. The content digest covers its files; the record digest covers those beside the manifest."""

Part = Literal["content", "record"]
ADVICE = "remove this folder and run the stage that made it again"
"""Advice for a damaged artifact. A run does not read the arrays of a finished stage, so the same command would skip the
stage while the folder is there."""


class Parent(BaseModel):
    """Identity of the artifact that a stage started from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    content: str = ""
    """Content digest; empty if an earlier llmctl saved the parent."""


class Digest(BaseModel):
    """SHA-256 checksums of some fields and files, and one digest over all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    fields: dict[str, str]
    files: dict[str, str]

    @classmethod
    def over(cls, values: dict[str, Any], files: dict[str, str]) -> Digest:
        """Return the digest over JSON values and over files with these checksums."""
        named = {name: checksums.of_json(value) for name, value in values.items()}
        return cls(digest=checksums.of_json([named, files]), fields=named, files=files)

    @property
    def holds(self) -> bool:
        """Return whether the digest is that of these checksums."""
        return self.digest == checksums.of_json([self.fields, self.files])


class Checksums(BaseModel):
    """Digests of an artifact: over what can change an answer, and over the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content: Digest
    record: Digest


class Manifest(BaseModel):
    """Metadata of an artifact: all but its arrays. Reading it does not need JAX."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    name: str
    stage: str
    key: str
    family: str
    model: ModelConfig
    labels: list[str] = []
    """Class names, if the model has a classification head."""
    task: str = ""
    """Task that it was finetuned for, a name of `llmctl.evaluate.tasks.registry`; empty is that of the head's name."""
    fitted: dict[str, Any] = {}
    """Values that the task chose on validation data, such as one threshold per label."""
    fitted_for: str = ""
    """Name of the ancestor that `fitted` was chosen for; empty if it was chosen for this artifact."""
    parameters: int
    bytes: int
    """Size of `params/` on disk in bytes. Equal weights may take a few bytes more or less."""
    sparsity: float
    """Fraction of zeros in the weight matrices."""
    pruned: bool = False
    """Whether the matrices were pruned: their zeros, whatever their share and the number type, are the mask. Stages ask
    this field alone. Pruning sets it and descendants inherit it."""
    nonfinite: list[str] = []
    """Names of the arrays that hold NaN or infinity, which a stage saves only if it was told to."""
    bits: float
    """Stored bits per parameter, scales included."""
    digest: str
    """SHA-256 over names, types, shapes and values of all arrays."""
    parent: Parent | None = None
    tokenizer: str = ""
    """Digest of the tokenizer."""
    config: dict[str, Any] = {}
    """Resolved config of the stage."""
    metrics: dict[str, Any] = {}
    seq_len: int = 0
    """Sequence length in training, in tokens; 0 if unknown."""
    truncate: Literal["", "tail", "head_tail"] = ""
    """Truncation of long texts in training; empty if unknown."""
    weights: dict[str, dict[str, Any]] = {}
    """Node type, dtypes and shapes of each weight, as `llmctl.model.weights.describe` returns them."""
    versions: dict[str, str] = {}
    checksums: Checksums | None = None
    """Checksums of the fields above and of the files beside; None if an earlier llmctl saved the artifact."""

    @field_validator("weights")
    @classmethod
    def _describe_arrays(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, record in value.items():
            parts = record.get("parts", {})
            if not isinstance(parts, dict) or not all(_is_array(part) for part in parts.values()):
                raise ValueError(f"the parts of {name} are not described by dtype and shape")
        return value

    @property
    def content(self) -> str:
        """Return the digest over everything that can change an answer; empty if an earlier llmctl saved it."""
        return self.checksums.content.digest if self.checksums else ""

    @property
    def weight_bytes(self) -> int:
        """Return the size of the arrays in memory, in bytes. `bytes` is their size on disk, after compression."""
        arrays = (part for record in self.weights.values() for part in record.get("parts", {}).values())
        return sum(-(-math.prod(shape) * type_bits(dtype) // 8) for dtype, shape in arrays)

    def as_parent(self) -> Parent:
        """Return the identity that an artifact made from this one records."""
        return Parent(name=self.name, digest=self.digest, content=self.content)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a manifest into a folder, with checksums of its fields and of the files that are there.

    Call this last, in one process. The arrays have their own digest, so `params/` is left out.

    Returns:
      The manifest with its checksums.
    """
    values = json.loads(manifest.model_dump_json(exclude={"checksums"}))
    words = {name: value for name, value in values.items() if name not in CONTENT}
    summed = Checksums(
        content=Digest.over({name: values[name] for name in CONTENT}, _content_files(folder)),
        record=Digest.over(words, _record_files(folder)),
    )
    whole = manifest.model_copy(update={"checksums": summed})
    (folder / NAME).write_text(whole.model_dump_json(indent=1), encoding="utf-8")
    return whole


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the artifact at `path`, and compare the fields that can change an answer with their digest.

    Raises:
      RequestError: there is no manifest, it is damaged, or its format is later than `FORMAT`; or a link in the folder
        leads out of it.
    """
    content = _raw(path)
    try:
        if wrong := _fields(content, "content"):
            raise RequestError(f"{path}: damaged ({listed(wrong.values())}); {ADVICE}")
        return Manifest.model_validate(content)
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e


def damaged_fields(path: Path, part: Part) -> dict[str, str]:
    """Compare the fields of a manifest with their checksums.

    Args:
      path: folder of the artifact.
      part: "content" compares the fields that can change an answer, "record" the others.

    Returns:
      What is wrong with each field that differs, as a clause, by its name.

    Raises:
      RequestError: as `read_manifest`, for a manifest that cannot be parsed.
    """
    content = _raw(path)
    try:
        return _fields(content, part)
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e


def damaged_files(path: Path, manifest: Manifest, part: Part) -> dict[str, str]:
    """Compare the files of an artifact with their checksums. The arrays in `params/` are left to `load`.

    Args:
      path: folder of the artifact.
      manifest: its manifest.
      part: "content" compares the tokenizer, "record" the files beside the manifest.

    Returns:
      What is wrong with each file that differs, as a clause, by its path in the folder.
    """
    summed = manifest.checksums
    if part == "content":
        inner = {n.partition("/")[2]: c for n, c in summed.content.files.items()} if summed else None
        wrong = {} if inner is None else checksums.differing(path / TOKENIZER, inner)
        return {f"{TOKENIZER}/{n}": f"{TOKENIZER}/{n} {what}" for n, what in wrong.items()} or _other(path, manifest)
    found = {}
    for name, checksum in summed.record.files.items() if summed else ():
        if not (path / name).is_file():
            found[name] = f"{name} is missing"
        elif checksums.of_file(path / name) != checksum:
            found[name] = f"{name} does not match what was saved"
    return found


def listed(clauses: Iterable[str]) -> str:
    """Return the first clauses as one, with the number of the others."""
    found = list(clauses)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _is_array(part: Any) -> bool:
    """Return whether a part of a weight's record is [dtype, shape]."""
    if not isinstance(part, (list, tuple)) or len(part) != 2 or not isinstance(part[0], str):
        return False
    return isinstance(part[1], (list, tuple)) and all(isinstance(n, int) and n >= 0 for n in part[1])


def _other(path: Path, manifest: Manifest) -> dict[str, str]:
    """Compare the tokenizer's descriptor with the tokenizer that the model was trained with."""
    from llmctl.data.tokenizers.base import DESCRIPTOR

    if not manifest.tokenizer:
        return {}
    try:
        digest = str(parse_json((path / TOKENIZER / DESCRIPTOR).read_bytes())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return {TOKENIZER: f"{TOKENIZER}/{DESCRIPTOR} is missing or damaged"}
    if digest == manifest.tokenizer:
        return {}
    return {TOKENIZER: f"the tokenizer is another ({digest[:12]}) than the model's ({manifest.tokenizer[:12]})"}


def _raw(path: Path) -> dict[str, Any]:
    file = Path(path) / NAME
    if not file.is_file():
        raise RequestError(f"{path}: not an artifact (it has no manifest.json); name a folder that a stage wrote")
    containment.check(path)
    try:
        content = parse_json(file.read_bytes())
        version = content["format"]
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e
    if isinstance(version, int) and version > FORMAT:
        raise RequestError(
            f"{path}: artifact format {version} is later than this llmctl reads ({FORMAT}); upgrade llmctl"
        )
    return content


def _fields(content: dict[str, Any], part: Part) -> dict[str, str]:
    """Compare the fields as they are in the file. Fields of later versions and their defaults thus do not matter."""
    if content.get("checksums") is None:
        return {}
    try:
        summed = Checksums.model_validate(content["checksums"])
    except ValidationError as e:
        raise ValueError(f"checksums: {e.errors()[0]['loc']}: {e.errors()[0]['msg']}") from None
    own: Digest = getattr(summed, part)
    here = {name: checksums.of_json(value) for name, value in content.items()}
    wrong = {n: _differs(n) for n, checksum in own.fields.items() if here.get(n) != checksum}
    if part == "content":
        known = own.fields.keys() | summed.record.fields.keys()
        wrong |= {n: f"the manifest's `{n}` was not saved with it" for n in CONTENT if n in content and n not in known}
    return wrong or ({} if own.holds else {"checksums": _differs("checksums")})


def _differs(name: str) -> str:
    return f"the manifest's `{name}` {'do' if name.endswith('s') else 'does'} not match what was saved"


def _content_files(folder: Path) -> dict[str, str]:
    return {f"{TOKENIZER}/{name}": c for name, c in checksums.of_folder(folder / TOKENIZER).items()}


def _record_files(folder: Path) -> dict[str, str]:
    """Return the checksums of the files beside the manifest: logs, and the results of an evaluation."""
    there = sorted(p for p in folder.iterdir() if p.is_file() and p.name != NAME and not p.name.startswith("."))
    return {p.name: checksums.of_file(p) for p in there}


def _damaged(path: Path, e: Exception) -> RequestError:
    reason = f"{e.errors()[0]['loc']}: {e.errors()[0]['msg']}" if isinstance(e, ValidationError) else str(e)
    reason = " ".join(reason.split())[:200]
    return RequestError(f"{Path(path) / NAME}: damaged manifest ({reason}); run the stage that made it again")
