"""Read and write `manifest.json`: the metadata of an artifact, with checksums of its fields and files.

There are two digests. The content digest covers everything that can change predictions: some manifest fields, the
digest of the arrays, and the tokenizer's files. It is checked at every read. The record digest covers the rest:
metrics, parents, sizes and logs. `llmctl verify` checks both.

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

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from llmctl.artifacts.fingerprint import type_bits
from llmctl.config import checksums, containment
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.model.config import ModelConfig

FORMAT = 1
"""Version of the folder layout of artifacts that contain all of their arrays. If it changes, stages run again."""
ADAPTER_FORMAT = 2
"""Version of the folder layout of adapters."""
SPARSE_FORMAT = 3
"""Version of the folder layout of artifacts with sparse arrays. Artifacts of a later version are rejected."""

NAME = "manifest.json"
CONTENT = (
    *("family", "model", "labels", "task", "fitted", "pruned", "nonfinite", "digest", "tokenizer", "seq_len"),
    *("truncate", "generation", "weights", "base", "storage"),
)
"""Manifest fields that can change predictions or the result of a later stage. The content digest covers them."""
TOKENIZER = "tokenizer"
"""Name of the tokenizer's folder. The content digest covers its files."""

Part = Literal["content", "record"]
ADVICE = "remove this folder and run the stage that made it again"
"""Advice for a damaged artifact. The folder must be removed first, because stages whose artifact exists are skipped,
without a look at its arrays."""


class Parent(BaseModel):
    """Store the name and the digests of the artifact that a stage started from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    content: str = ""
    """Content digest; empty if an earlier version of llmctl saved the parent."""

    def is_of(self, manifest: Manifest) -> bool:
        """Return True if the artifact with this manifest is the recorded parent, as its digests show."""
        return manifest.content == self.content and (bool(self.content) or manifest.digest == self.digest)


class Base(Parent):
    """Store the identity of an adapter's base, and the names of the arrays in the adapter's own folder.

    The base is the artifact that contains all other arrays of the model.
    """

    stored: list[str]
    """Names of the arrays in the adapter's folder, such as `decoder/blocks/attn/q/kernel:a`."""
    stored_digest: str
    """SHA-256 over the names, dtypes, shapes and values of the stored arrays."""


class Digest(BaseModel):
    """Store SHA-256 checksums of some fields and files, and one digest that is computed from all these checksums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    fields: dict[str, str]
    files: dict[str, str]

    @classmethod
    def over(cls, values: dict[str, Any], files: dict[str, str]) -> Digest:
        """Compute the digest over the JSON values {name: value} and the checksums of files {path: checksum}."""
        named = {name: checksums.of_json(value) for name, value in values.items()}
        return cls(digest=checksums.of_json([named, files]), fields=named, files=files)

    @property
    def is_consistent(self) -> bool:
        """Return True if the stored digest matches the stored checksums."""
        return self.digest == checksums.of_json([self.fields, self.files])


class Checksums(BaseModel):
    """Store the two digests of an artifact: of the data that can change predictions, and of the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content: Digest
    record: Digest


class Manifest(BaseModel):
    """Describe an artifact: all metadata, without the arrays. Reading a manifest does not need JAX.

    An artifact is a model that a stage, such as pretrain or prune, has saved in a folder.
    """

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
    """Task that the model was finetuned for, a name in `llmctl.evaluate.tasks.registry`. If empty, the task is the one
    with the name of the model's head."""
    fitted: dict[str, Any] = {}
    """Values that the task fitted on validation data, such as one threshold per class."""
    fitted_for: str = ""
    """Name of the earlier artifact whose predictions `fitted` was computed from; empty if they are those of this
    artifact."""
    parameters: int
    bytes: int
    """Size of `params/` on disk in bytes. Two copies of equal weights may differ by a few bytes, because they are
    compressed."""
    sparsity: float
    """Fraction of elements of the weight matrices that are zero."""
    pruned: bool = False
    """Whether the matrices were pruned. If so, their zeros are the pruning mask, and later stages keep them. Pruning
    sets this field and later stages inherit it. No stage infers it from the weights."""
    nonfinite: list[str] = []
    """Names of arrays that contain NaN or infinity. Such arrays are saved only with `allow_nonfinite`."""
    bits: float
    """Average number of stored bits per parameter, including the scales of quantized weights."""
    digest: str
    """SHA-256 over the names, dtypes, shapes and values of all arrays of the model. For an adapter, the arrays of its
    base are included."""
    parent: Parent | None = None
    tokenizer: str = ""
    """Digest of the tokenizer."""
    config: dict[str, Any] = {}
    """Resolved config of the stage."""
    metrics: dict[str, Any] = {}
    seq_len: int = 0
    """Sequence length in training, in tokens; 0 if unknown."""
    truncate: Literal["", "tail", "head_tail"] = ""
    """Part of long texts that training removes (see `data.config.Truncate`); empty if unknown."""
    generation: dict[str, Any] = {}
    """Settings of generated answers that the model was finetuned with; empty if its task generates none."""
    weights: dict[str, dict[str, Any]] = {}
    """Kind of each weight by path, such as plain, quantized or LoRA, and the dtypes and shapes of its arrays, as
    returned by `llmctl.model.weights.describe`."""
    base: Base | None = None
    """Base of an adapter, which contains only a part of the arrays; None if the artifact contains all of them."""
    storage: dict[str, dict[str, Any]] = {}
    """Arrays that are stored in a sparse format, by name, with the records of `llmctl.artifacts.sparse_storage`. All
    other arrays are stored as they are in memory."""
    versions: dict[str, str] = {}
    checksums: Checksums | None = None
    """Checksums of the fields above and of the artifact's files. None if an earlier version of llmctl saved the
    artifact."""

    @field_validator("weights")
    @classmethod
    def _describe_arrays(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, record in value.items():
            parts = record.get("parts", {})
            if not isinstance(parts, dict) or not all(_is_array(part) for part in parts.values()):
                raise ValueError(f"the parts of {name} are not described by dtype and shape")
        return value

    @model_serializer(mode="wrap")
    def _without_defaults(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit `base` and `storage` if they are empty, so that the digests of other artifacts stay as before."""
        return {name: value for name, value in fields(self).items() if value or name not in ("base", "storage")}

    @property
    def content(self) -> str:
        """Return the digest over everything that can change predictions. It is empty for artifacts that an earlier
        version of llmctl saved."""
        return self.checksums.content.digest if self.checksums else ""

    @property
    def weight_bytes(self) -> int:
        """Return the size of the arrays in memory, in bytes. The field `bytes` is their compressed size on disk."""
        arrays = (part for record in self.weights.values() for part in record.get("parts", {}).values())
        return sum(-(-math.prod(shape) * type_bits(dtype) // 8) for dtype, shape in arrays)

    def as_parent(self) -> Parent:
        """Return the name and digests of this artifact, which artifacts made from it store as their parent."""
        return Parent(name=self.name, digest=self.digest, content=self.content)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a manifest into a folder, with checksums of its fields and of the files in the folder.

    Call this last, in one process. The folder `params/` is omitted, because the arrays have their own digest.

    Returns:
        The manifest with its checksums.
    """
    values = json.loads(manifest.model_dump_json(exclude={"checksums"}))
    words = {name: value for name, value in values.items() if name not in CONTENT}
    summed = Checksums(
        content=Digest.over({name: values[name] for name in CONTENT if name in values}, _content_files(folder)),
        record=Digest.over(words, _record_files(folder)),
    )
    whole = manifest.model_copy(update={"checksums": summed})
    (folder / NAME).write_text(whole.model_dump_json(indent=1), encoding="utf-8")
    return whole


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the artifact at `path`, and check the content digest of its fields.

    Raises:
        RequestError: If there is no manifest, if it is damaged, if its format is later than `SPARSE_FORMAT`, or if a
            link in the folder leads outside it.
    """
    content = _raw(path)
    try:
        if wrong := _field_differences(content, "content"):
            raise RequestError(f"{path}: damaged ({listed(wrong.values())}); {ADVICE}")
        manifest = Manifest.model_validate(content)
        if manifest.base and not manifest.checksums:  # chains of bases end, because a digest cannot contain itself
            raise ValueError("an adapter without checksums")
        return manifest
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e


def damaged_fields(path: Path, part: Part) -> dict[str, str]:
    """Find the fields of a manifest that differ from their checksums.

    Args:
        path: Folder of the artifact.
        part: "content" for the fields that can change predictions, "record" for the others.

    Returns:
        {name of the field: message} for the fields that differ.

    Raises:
        RequestError: If the manifest cannot be parsed.
    """
    content = _raw(path)
    try:
        return _field_differences(content, part)
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e


def damaged_files(path: Path, manifest: Manifest, part: Part) -> dict[str, str]:
    """Find the files of an artifact, outside `params/`, that differ from their checksums.

    Args:
        path: Folder of the artifact.
        manifest: Manifest of the artifact.
        part: "content" for the tokenizer's files, "record" for the files next to the manifest, such as logs.

    Returns:
        {relative path: message} for the files that differ.
    """
    summed = manifest.checksums
    if part == "content":
        inner = {n.partition("/")[2]: c for n, c in summed.content.files.items()} if summed else None
        wrong = {} if inner is None else checksums.differing(path / TOKENIZER, inner)
        return {f"{TOKENIZER}/{n}": f"{TOKENIZER}/{n} {what}" for n, what in wrong.items()} or _tokenizer_difference(
            path, manifest
        )
    found = {}
    for name, checksum in summed.record.files.items() if summed else ():
        if not (path / name).is_file():
            found[name] = f"{name} is missing"
        elif checksums.of_file(path / name) != checksum:
            found[name] = f"{name} does not match what was saved"
    return found


def listed(clauses: Iterable[str]) -> str:
    """Join strings with commas. If there are more than three, the others are replaced by " and N more"."""
    found = list(clauses)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _is_array(part: Any) -> bool:
    """Return True if `part` is a list [dtype, shape], which describes one array in a manifest."""
    if not isinstance(part, (list, tuple)) or len(part) != 2 or not isinstance(part[0], str):
        return False
    return isinstance(part[1], (list, tuple)) and all(isinstance(n, int) and n >= 0 for n in part[1])


def _tokenizer_difference(path: Path, manifest: Manifest) -> dict[str, str]:
    """Compare the digest that the tokenizer's folder declares with the tokenizer digest in the manifest.

    Returns:
        {name of the tokenizer's folder: message} if they differ or the folder's description is damaged, else {}.
    """
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
    if isinstance(version, int) and version > SPARSE_FORMAT:
        raise RequestError(
            f"{path}: artifact format {version} is later than this llmctl reads ({SPARSE_FORMAT}); upgrade llmctl"
        )
    return content


def _field_differences(content: dict[str, Any], part: Part) -> dict[str, str]:
    """Find the fields of manifest.json that differ from their checksums.

    Fields that the file lacks are ignored, even if they have a default in this version.

    Args:
        content: Parsed manifest.json.
        part: "content" for the fields that can change predictions, "record" for the others.

    Returns:
        {name of the field: message} for the fields that differ.

    Raises:
        ValueError: If the checksums are not in the expected format.
    """
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
    return wrong or ({} if own.is_consistent else {"checksums": _differs("checksums")})


def _differs(name: str) -> str:
    return f"the manifest's `{name}` {'do' if name.endswith('s') else 'does'} not match what was saved"


def _content_files(folder: Path) -> dict[str, str]:
    return {f"{TOKENIZER}/{name}": c for name, c in checksums.of_folder(folder / TOKENIZER).items()}


def _record_files(folder: Path) -> dict[str, str]:
    """Return the checksums of the files next to the manifest, by name: logs and evaluation results."""
    there = sorted(p for p in folder.iterdir() if p.is_file() and p.name != NAME and not p.name.startswith("."))
    return {p.name: checksums.of_file(p) for p in there}


def _damaged(path: Path, e: Exception) -> RequestError:
    reason = f"{e.errors()[0]['loc']}: {e.errors()[0]['msg']}" if isinstance(e, ValidationError) else str(e)
    reason = " ".join(reason.split())[:200]
    return RequestError(f"{Path(path) / NAME}: damaged manifest ({reason}); run the stage that made it again")
