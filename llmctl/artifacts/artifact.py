"""Artifacts: what stages read and write. A folder with `manifest.json`, `params/` (Orbax) and the tokenizer.

An artifact appears whole or not at all: it is written beside its place and renamed. Its manifest names every array, so
it is restored with explicit types and shardings onto any mesh, and its digest is checked whenever it is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmctl.artifacts import orbax_logging
from llmctl.artifacts.atomic import size, writing
from llmctl.artifacts.fingerprint import digest, take
from llmctl.config.errors import RequestError
from llmctl.model.config import ModelConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

FORMAT = 1
"""Version of the layout; a reader refuses a later one."""


class Parent(BaseModel):
    """Where an artifact came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str


class Manifest(BaseModel):
    """Everything about an artifact but its arrays. JAX is not needed to read it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    name: str
    stage: str
    key: str
    family: str
    model: ModelConfig
    labels: list[str] = []
    """Names of the classes, where the head has classes."""
    parameters: int
    bytes: int
    """Size of `params/` on disk."""
    sparsity: float
    """Share of zeros among the matrices' entries."""
    pruned: bool = False
    """Zeros were put there by pruning (not by rounding to integers), and stages that follow keep them."""
    bits: float
    """Stored bits a parameter, scales included."""
    digest: str
    """SHA-256 over names, types, shapes and values of all arrays."""
    parent: Parent | None = None
    tokenizer: str = ""
    """Digest of the tokenizer."""
    config: dict[str, Any] = {}
    """The resolved config of the stage."""
    metrics: dict[str, Any] = {}
    seq_len: int = 0
    """Tokens a text that it was trained with; 0 where nobody knows."""
    truncate: Literal["", "tail", "head_tail"] = ""
    """What a text too long kept in training; empty where nobody knows."""
    weights: dict[str, dict[str, Any]] = {}
    """Type of each weight, as `llmctl.model.weights.describe` gives it."""
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact."""

    path: Path
    manifest: Manifest
    params: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        """The config that the parameters have the shapes of."""
        return self.manifest.model

    @property
    def plain(self) -> bool:
        """Every weight is a plain array: neither quantized nor with a low-rank pair."""
        return all("" in record["parts"] for record in self.manifest.weights.values())

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of the tokenizer."""
        return self.path / "tokenizer"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the artifact at `path`. Raises RequestError where there is none that can be read."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        raise RequestError(f"{path}: not an artifact (it has no manifest.json); name a folder that a stage wrote")
    try:
        content = json.loads(file.read_text())
        version = content["format"]
        if isinstance(version, int) and version > FORMAT:
            raise RequestError(
                f"{path}: artifact format {version} is later than this llmctl reads ({FORMAT}); upgrade llmctl"
            )
        return Manifest.model_validate(content)
    except (ValueError, KeyError, TypeError) as e:
        reason = f"{e.errors()[0]['loc']}: {e.errors()[0]['msg']}" if isinstance(e, ValidationError) else str(e)
        raise RequestError(f"{file}: damaged manifest ({_one_line(reason)}); run the stage that made it again") from e


def load(path: Path, mesh: Mesh | None = None) -> Artifact:
    """Manifest and parameters, sharded over `mesh` by the rules (all on the default mesh where None).

    Raises RequestError where the folder is no artifact, or is damaged, or does not fit the mesh.
    """
    import orbax.checkpoint as ocp

    from llmctl.model import weights

    orbax_logging.hush()
    there = abstract(path, mesh)
    target = {name: weights.parts(w) for name, w in weights.flatten(there.params).items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                (there.path / "params").absolute(), weights.unflatten({k: _plain(v) for k, v in target.items()})
            )
    except Exception as e:  # Orbax and TensorStore raise many types for a damaged or truncated store
        raise RequestError(f"{path}/params: damaged ({_first(str(e))}); run the stage that made it again") from e
    arrays = {name: _lookup(tree, name) for name in target}
    arrays = {name: a if isinstance(a, dict) else {"": a} for name, a in arrays.items()}
    params = {name: weights.assemble(there.manifest.weights[name], arrays[name]) for name in target}
    if digest(params) != there.manifest.digest:
        raise RequestError(
            f"{path}/params: damaged (digest differs from the manifest's); run the stage that made it again"
        )
    return replace(there, params=weights.unflatten(params))


def abstract(path: Path, mesh: Mesh | None = None) -> Artifact:
    """As `load`, with shapes, types and shardings in place of arrays: only the manifest is read."""
    import jax

    from llmctl.config.settings import MeshConfig
    from llmctl.distributed import mesh as meshes
    from llmctl.model import functional, weights

    path = Path(path)
    manifest = read_manifest(path)
    if not manifest.weights:
        raise RequestError(f"{path}: holds no model (stage {manifest.stage!r}); name an artifact with parameters")
    mesh = mesh or meshes.make(MeshConfig())
    nodes = {}
    for name, record in manifest.weights.items():
        parts = {k: jax.ShapeDtypeStruct(shape, jax.numpy.dtype(d)) for k, (d, shape) in record["parts"].items()}
        nodes[name] = weights.assemble(record, parts)
    _check_shapes(path, nodes, weights.flatten(functional.abstract(manifest.model)))
    return Artifact(path, manifest, functional.laid_out(manifest.model, weights.unflatten(nodes), mesh))


def _plain(parts: dict[str, Any]) -> Any:
    return parts.get("", parts)


def _lookup(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _check_shapes(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """The arrays are those of the config: no more, no fewer, of the same shapes."""
    odd = sorted(stored.keys() ^ expected.keys())
    odd += [k for k in stored.keys() & expected.keys() if tuple(stored[k].shape) != tuple(expected[k].shape)]
    if odd:
        raise RequestError(
            f"{path}: parameters contradict the model config at {', '.join(odd[:4])}; the artifact is damaged"
        )


def check_place(out: Path, *reads: Path) -> None:
    """Raises RequestError where an artifact at `out` would replace what is none, or what it is made of (`reads`)."""
    if any(read.resolve().is_relative_to(out.resolve()) for read in reads):
        raise RequestError(f"{out}: would replace what it is made of; choose another folder")
    if out.exists() and not (out / "manifest.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: is there already and is not an artifact; move it away, or choose another folder")


def save(
    out: Path,
    params: Mapping[str, Any],
    model: ModelConfig,
    *,
    stage: str,
    key: str,
    config: dict[str, Any],
    name: str = "",
    parent: Manifest | None = None,
    labels: list[str] | None = None,
    metrics: dict[str, Any] | None = None,
    tokenizer_dir: Path | None = None,
    log: Path | None = None,
    written: Path | None = None,
) -> Manifest:
    """Writes the artifact `out` atomically and returns its manifest; a full disk is a WorkError and leaves nothing.

    Where `written` is a folder that has the arrays already, it becomes the artifact's `params`, and `params` is what it
    holds by path, read one weight at a time.
    """
    import orbax.checkpoint as ocp

    from llmctl.data.tokenizers import loading as tokenizers
    from llmctl.distributed import processes
    from llmctl.model import weights

    out = Path(out)
    flat = params if written else weights.flatten(dict(params))
    with writing(out) as draft:
        measured = take(flat)
        if written:
            shutil.move(written, draft / "params")
        else:
            tree = weights.unflatten({path: _plain(weights.parts(w)) for path, w in flat.items()})
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((draft / "params").absolute(), tree)
                checkpointer.wait_until_finished()
        measured["pruned"] |= parent is not None and parent.pruned and measured["bits"] < 32
        manifest = Manifest(
            format=FORMAT,
            name=name or out.name,
            stage=stage,
            key=key,
            family=model.family,
            model=model.model_copy(update={"preset": ""}),
            labels=labels or [],
            bytes=size(draft / "params"),
            parent=Parent(name=parent.name, digest=parent.digest) if parent else None,
            tokenizer=tokenizers.load(tokenizer_dir).digest if tokenizer_dir else "",
            config=config,
            metrics=metrics or {},
            seq_len=config.get("train", {}).get("seq_len") or (parent.seq_len if parent else 0),
            truncate=config.get("truncate") or (parent.truncate if parent else ""),
            versions=versions(),
            **measured,
        )
        if processes.first():
            if tokenizer_dir:
                shutil.copytree(tokenizer_dir, draft / "tokenizer")
            if log and log.exists():
                shutil.copy(log, draft / "log.jsonl")
            (draft / "manifest.json").write_text(manifest.model_dump_json(indent=1))
    return manifest


def versions() -> dict[str, str]:
    """What made the artifact."""
    return {p: metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint", "qwix")}


def _first(text: str) -> str:
    """What is wrong, without the dump that follows where an array cannot be read."""
    return _one_line(text.partition(". See full TensorStore details")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
