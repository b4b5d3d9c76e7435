"""Read and write artifacts: folders with `manifest.json`, parameters in `params/` (Orbax) and a tokenizer.

An artifact is written to a temporary folder, which is then renamed. An artifact is therefore never incomplete. The
manifest lists the type and shape of every array, so arrays can be restored onto any mesh. `load` checks the digests of
the manifest's fields, the tokenizer's files and the arrays.

Example:
  >>> found = load(folder)
  >>> found.model.family, found.manifest.stage, sorted(found.params)
  ('llama', 'pretrain', ['decoder', 'embed'])
  >>> abstract(folder).params["decoder"]["norm"]["scale"].dtype
  dtype('float32')
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import orbax_logging
from llmctl.artifacts.atomic import size, writing
from llmctl.artifacts.fingerprint import digest, manifest_fields
from llmctl.artifacts.manifest import (
    ADVICE,
    FORMAT,
    Manifest,
    Parent,
    damaged_files,
    listed,
    read_manifest,
    write_manifest,
)
from llmctl.config import containment, limits
from llmctl.config.errors import RequestError, WorkError
from llmctl.distributed import locks
from llmctl.model.config import ModelConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = ["FORMAT", "Artifact", "Manifest", "Parent", "abstract", "load", "read_manifest", "save", "write_manifest"]


FILES = {
    *("manifest.json", "params", "tokenizer", "log.jsonl"),
    *("results.json", "table.md", "tradeoff.png", "predictions.jsonl"),
}
"""Names of the files and folders that stages write into an artifact's folder."""


@dataclass(frozen=True)
class Artifact:
    """Store a loaded artifact: its folder, its manifest and its parameter tree.

    `load` returns an artifact with arrays. `abstract` returns one with shapes, dtypes and shardings in their place.
    """

    path: Path
    manifest: Manifest
    params: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        """Return the model config; its shapes are those of the parameters."""
        return self.manifest.model

    @property
    def plain(self) -> bool:
        """Return True if every weight is a plain array, and False if any is quantized or has an adapter."""
        return all("" in record["parts"] for record in self.manifest.weights.values())

    @property
    def zeros(self) -> frozenset[str]:
        """Return the names of arrays whose zeros later training must keep.

        If the model was pruned, these are the matrices of the layers. Otherwise there are none.
        """
        from llmctl.model import weights

        return weights.zero_names(self.params) if self.manifest.pruned else frozenset()

    @property
    def tokenizer_dir(self) -> Path:
        """Return the folder of the tokenizer."""
        return self.path / "tokenizer"


def load(path: Path, mesh: Mesh | None = None) -> Artifact:
    """Load an artifact: its manifest and its parameters, sharded over `mesh` by the sharding rules.

    Args:
        path: Folder of the artifact.
        mesh: Target mesh; by default the mesh of the default `MeshConfig`.

    Raises:
        RequestError: If the folder is no artifact or is damaged, or if the arrays do not fit the mesh or the memory.
    """
    import jax
    import orbax.checkpoint as ocp

    from llmctl.model import weights

    orbax_logging.silence_late_errors()
    there = abstract(path, mesh)
    if wrong := damaged_files(there.path, there.manifest, "content"):
        raise RequestError(f"{path}: damaged ({listed(wrong.values())}); {ADVICE}")
    devices = sum((d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices())
    share = there.manifest.weight_bytes // jax.process_count()
    limits.check_memory(share - devices, f"{path}: its arrays", "use more devices or processes")
    target = {name: weights.parts(w) for name, w in weights.flatten(there.params).items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                (there.path / "params").absolute(), weights.unflatten({k: _plain(v) for k, v in target.items()})
            )
    except Exception as e:  # Orbax and TensorStore raise many types for a damaged or truncated store
        raise RequestError(f"{path}: damaged (params: {_first(str(e))}); {ADVICE}") from e
    arrays = {name: _lookup(tree, name) for name in target}
    arrays = {name: a if isinstance(a, dict) else {"": a} for name, a in arrays.items()}
    params = {name: weights.assemble(there.manifest.weights[name], arrays[name]) for name in target}
    if digest(params) != there.manifest.digest:
        raise RequestError(f"{path}: damaged (params: the digest differs from the manifest's); {ADVICE}")
    return replace(there, params=weights.unflatten(params))


def abstract(path: Path, mesh: Mesh | None = None) -> Artifact:
    """Load an artifact with shapes, dtypes and shardings in place of arrays. Only the manifest is read.

    Args:
        path: Folder of the artifact.
        mesh: Target mesh, as in `load`.

    Raises:
        RequestError: If `load` would raise it, or if the artifact has no parameters.
    """
    import jax

    from llmctl.config.settings import MeshConfig
    from llmctl.distributed import mesh as meshes
    from llmctl.model import functional, weights

    path = Path(path)
    manifest = read_manifest(path)
    if not manifest.weights:
        raise RequestError(f"{path}: holds no model (stage {manifest.stage!r}); name an artifact with parameters")
    mesh = mesh or meshes.make(MeshConfig())
    nodes, name = {}, ""
    try:
        for name, record in manifest.weights.items():
            parts = {k: jax.ShapeDtypeStruct(shape, jax.numpy.dtype(d)) for k, (d, shape) in record["parts"].items()}
            nodes[name] = weights.assemble(record, parts)
    except RequestError as e:
        raise RequestError(f"{path}: {name}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise RequestError(f"{path}: damaged (the record of {name}: {_first(str(e))}); {ADVICE}") from None
    _check_layers(path, manifest)
    _check_shapes(path, nodes, weights.flatten(functional.abstract(manifest.model)))
    return Artifact(path, manifest, functional.laid_out(manifest.model, weights.unflatten(nodes), mesh))


def _check_layers(path: Path, manifest: Manifest) -> None:
    """Check that the number of layers in the model config does not exceed that of the stored arrays.

    Code that builds lists with one entry per layer runs only after this check.

    Raises:
        RequestError: If the number is larger.
    """
    shapes = [shape for record in manifest.weights.values() for _, shape in record["parts"].values()]
    layers, most = manifest.model.layers, max((shape[0] for shape in shapes if shape), default=0)
    if layers > most:
        raise RequestError(f"{path}: the model config has {layers:,} layers, and no array has so many; it is damaged")


def _plain(parts: dict[str, Any]) -> Any:
    return parts.get("", parts)


def _lookup(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _check_shapes(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that the stored arrays have the names and shapes that the model config defines.

    Raises:
        RequestError: If they differ.
    """
    odd = sorted(stored.keys() ^ expected.keys())
    odd += [k for k in stored.keys() & expected.keys() if tuple(stored[k].shape) != tuple(expected[k].shape)]
    if odd:
        raise RequestError(
            f"{path}: parameters contradict the model config at {', '.join(odd[:4])}; the artifact is damaged"
        )


def check_output(out: Path, *reads: Path, stage: str = "", replace: bool = False) -> None:
    """Check that an artifact may be written to `out`.

    Args:
        out: Output folder.
        reads: Input folders of the stage.
        stage: Kind of the stage that writes the artifact. It may replace an artifact of the same kind.
        replace: Whether to replace an artifact of any kind.

    Raises:
        RequestError: If the path of `out` has a character that globs interpret, if `out` is or contains a folder of
            `reads`, or if `out` exists and is neither empty nor an artifact. If `replace` is false, also if `out` is an
            artifact of another kind of stage, or contains files that llmctl did not write.
    """
    locks.check_path(out, str(out))
    if any(read.resolve().is_relative_to(out.resolve()) for read in reads):
        raise RequestError(f"{out}: would replace what it is made of; choose another folder")
    if out.exists() and not (out / "manifest.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: is there already and is not an artifact; move it away, or choose another folder")
    if stage and not replace and (out / "manifest.json").exists():
        made = read_manifest(out)
        if made.stage != stage:
            raise RequestError(
                f"{out}: is an artifact of {made.stage!r}; --replace replaces it, or choose another folder"
            )
        own = FILES | {Path(name).parts[0] for name in (made.checksums.record.files if made.checksums else ())}
        if added := sorted(p.name for p in out.iterdir() if p.name not in own):
            raise RequestError(
                f"{out}: holds {added[0]!r}, which llmctl did not write and would delete; move it away, or --replace"
            )


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
    task: str | None = None,
    fitted: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    tokenizer_dir: Path | None = None,
    log: Path | None = None,
    written: Path | None = None,
    pruned: bool | None = None,
    rounded: bool = False,
    allow_nonfinite: bool = False,
) -> Manifest:
    """Save an artifact to `out` atomically, and return its manifest.

    Args:
        out: Output folder; an existing artifact is replaced.
        params: Parameter tree. If `written` is given, a flat mapping {path: weight}, from which one weight at a time is
            read.
        model: Model config; its shapes are those of the parameters.
        stage: Kind of the stage.
        key: Content key of the stage.
        config: Resolved config of the stage.
        name: Name of the artifact; by default the folder's name.
        parent: Manifest of the artifact that the stage started from.
        labels: Class names.
        task: Name of the task; by default the parent's, if it has the same head.
        fitted: Values that the task fitted on validation data; by default the parent's, if it has the same head.
        metrics: Measured metrics.
        tokenizer_dir: Tokenizer folder to copy.
        log: Log file to copy.
        written: Folder that contains the arrays in Orbax format; it is moved to `params/`.
        pruned: Whether zeros come from pruning. By default, the parent's value; without a parent, whether the fraction
            of zeros exceeds `fingerprint.PRUNED`.
        rounded: Whether the arrays are dequantized integers, which contain more zeros even without pruning.
        allow_nonfinite: Whether to save arrays that contain NaN or infinity.

    Raises:
        WorkError: If the disk is full, or if an array contains NaN or infinity and `allow_nonfinite` is false. `out` is
            then unchanged.
    """
    import orbax.checkpoint as ocp

    from llmctl.data.tokenizers import loading as tokenizers
    from llmctl.distributed import processes
    from llmctl.model import weights

    out = Path(out)
    flat = params if written else weights.flatten(dict(params))
    with writing(out) as draft:
        measured = manifest_fields(flat, rounded)
        if (bad := measured["nonfinite"]) and not allow_nonfinite:
            more = f" and {len(bad) - 1} more arrays" if len(bad) > 1 else ""
            raise WorkError(
                f"{out}: {bad[0]}{more} would hold NaN or infinity; --allow-nonfinite saves it all the same"
            )
        if written:
            shutil.move(written, draft / "params")
        else:
            tree = weights.unflatten({path: _plain(weights.parts(w)) for path, w in flat.items()})
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((draft / "params").absolute(), tree)
                checkpointer.wait_until_finished()
        like = parent if parent and parent.model.head == model.head else None
        measured["pruned"] = (parent.pruned if parent else measured["pruned"]) if pruned is None else pruned
        manifest = Manifest(
            format=FORMAT,
            name=name or out.name,
            stage=stage,
            key=key,
            family=model.family,
            model=model.model_copy(update={"preset": ""}),
            labels=labels or [],
            task=(like.task if like else "") if task is None else task,
            fitted=(like.fitted if like else {}) if fitted is None else fitted,
            fitted_for=(like.fitted_for or like.name) if like and like.fitted and fitted is None else "",
            bytes=size(draft / "params"),
            parent=parent.as_parent() if parent else None,
            tokenizer=tokenizers.load(tokenizer_dir).digest if tokenizer_dir else "",
            config=config,
            metrics=metrics or {},
            versions=versions(),
            **text_settings(config, parent),
            **measured,
        )
        if processes.first():
            if tokenizer_dir:
                containment.copy(tokenizer_dir, draft / "tokenizer")
            if log and log.exists():
                shutil.copy(log, draft / "log.jsonl")
        text = processes.broadcast(lambda: write_manifest(draft, manifest).model_dump_json())
    return Manifest.model_validate_json(text)


def text_settings(config: Mapping[str, Any], parent: Manifest | None) -> dict[str, Any]:
    """Return the manifest fields "seq_len" and "truncate", from the stage's config or else from the parent.

    Args:
        config: Resolved config of the stage.
        parent: Manifest of the artifact that the stage starts from.
    """
    return {
        "seq_len": config.get("train", {}).get("seq_len") or (parent.seq_len if parent else 0),
        "truncate": config.get("truncate") or (parent.truncate if parent else ""),
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that determine an artifact's content, by package name."""
    return {p: metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint", "qwix")}


def _first(text: str) -> str:
    """Shorten an error message to one line of at most 200 characters, without the details that TensorStore appends."""
    return " ".join(text.partition(". See full TensorStore details")[0].split())[:200]
