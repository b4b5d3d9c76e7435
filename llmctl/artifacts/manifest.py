"""Define the manifest: the metadata of an artifact, with checksums of its fields and files.

There are two digests. The content digest covers everything that can change predictions: some manifest fields, the
digest of the arrays, and the tokenizer's files. Every read checks the content digest. The record digest covers the
rest: metrics, parents, sizes and logs. `llmctl verify` checks both.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from llmctl.artifacts.fingerprint import type_bits
from llmctl.config import checksums
from llmctl.model.config import ModelConfig

FORMAT = 1
"""Version of the folder layout, for artifacts that contain all of their arrays. If the version changes, stages run
again."""
ADAPTER_FORMAT = 2
"""Version of the folder layout of adapters."""
SPARSE_FORMAT = 3
"""Version of the folder layout of artifacts with sparse arrays. Artifacts of a later version are rejected."""

NAME = "manifest.json"
CONTENT = (
    *("family", "model", "labels", "task", "fitted", "pruned", "nonfinite", "digest", "tokenizer", "seq_len"),
    *("truncate", "generation", "weights", "base", "storage"),
)
"""Manifest fields that can change predictions or the result of a later stage. The content digest covers these
fields."""
TOKENIZER = "tokenizer"
"""Name of the tokenizer's folder. The content digest covers the files of this folder."""


class Parent(BaseModel):
    """Store the name and the digests of the artifact that a stage started from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    content: str = ""
    """Content digest; empty if an earlier version of llmctl saved the parent."""

    def is_of(self, manifest: Manifest) -> bool:
        """Return True if a manifest has the digests of the recorded parent."""
        return manifest.content == self.content and (bool(self.content) or manifest.digest == self.digest)


class Base(Parent):
    """Store the identity of an adapter's base, and the names of the arrays in the adapter's own folder.

    The base is the artifact that contains all other arrays of the model.
    """

    stored: list[str]
    """Names of the arrays in the adapter's folder, such as `decoder/blocks/attn/q/kernel:a`."""
    stored_digest: str
    """SHA-256 over the names, dtypes, shapes and values of the stored arrays."""
    sparse: bool = False
    """Whether the base stores its pruned matrices in a sparse format."""

    @model_serializer(mode="wrap")
    def _without_default(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit `sparse` if it is false, so that earlier versions can read the manifest."""
        return {name: value for name, value in fields(self).items() if value or name != "sparse"}


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
    """Store the two digests of an artifact. The content digest covers the data that can change predictions. The record
    digest covers the rest."""

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
    """Task that the model was finetuned for, a name in `llmctl.evaluate.tasks.registry`. If empty, the task has the
    name of the model's head."""
    fitted: dict[str, Any] = {}
    """Values that the task fitted on validation data, such as one threshold per class."""
    fitted_for: str = ""
    """Name of the artifact from whose predictions `fitted` was computed; empty means this artifact."""
    parameters: int
    bytes: int
    """Size of `params/` on disk in bytes. The files are compressed. Two copies of equal weights may therefore differ by
    a few bytes."""
    sparsity: float
    """Fraction of zeros among the elements of the weight matrices."""
    pruned: bool = False
    """Whether the matrices were pruned. If true, the zeros are the pruning mask, and later stages keep the zeros.
    Pruning sets this field and later stages inherit it. No stage infers this field from the weights."""
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
    """Settings for generating answers, as in finetuning; empty if the task generates no answers."""
    weights: dict[str, dict[str, Any]] = {}
    """Record of each weight by path (see `llmctl.model.weights.describe`). A record has the kind of the weight, such as
    plain or quantized, and the dtypes and shapes of its arrays."""
    base: Base | None = None
    """Base of this artifact, if it is an adapter; None if the artifact contains all arrays."""
    storage: dict[str, dict[str, Any]] = {}
    """Records of the arrays in a sparse format, by array name (see `llmctl.artifacts.sparse_storage`). All other arrays
    are stored as they are in memory."""
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
        """Omit `base` and `storage` if they are empty, so that manifests of earlier versions keep their digests."""
        return {name: value for name, value in fields(self).items() if value or name not in ("base", "storage")}

    @property
    def content(self) -> str:
        """Return the digest over everything that can change predictions. For manifests of earlier versions, return
        ""."""
        return self.checksums.content.digest if self.checksums else ""

    @property
    def weight_bytes(self) -> int:
        """Return the size of all arrays in memory, in bytes. The field `bytes` has their compressed size on disk."""
        arrays = (part for record in self.weights.values() for part in record.get("parts", {}).values())
        return sum(-(-math.prod(shape) * type_bits(dtype) // 8) for dtype, shape in arrays)

    @property
    def stores_sparse(self) -> bool:
        """Return whether the pruned matrices are stored in a sparse format, in this folder or in the base's folder.

        Later stages that save all arrays then use a sparse format too.
        """
        return bool(self.storage) or (self.base is not None and self.base.sparse)

    def as_parent(self) -> Parent:
        """Return the name and the digests of this artifact. An artifact that starts from this artifact stores the
        result as `parent`.
        """
        return Parent(name=self.name, digest=self.digest, content=self.content)


def _is_array(part: Any) -> bool:
    """Return True if `part` is a list [dtype, shape], which describes one array in a manifest."""
    if not isinstance(part, (list, tuple)) or len(part) != 2 or not isinstance(part[0], str):
        return False
    return isinstance(part[1], (list, tuple)) and all(isinstance(n, int) and n >= 0 for n in part[1])
