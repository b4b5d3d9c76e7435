"""Save artifacts atomically, and check that an artifact may be written to a folder.

Example:
  >>> check_output(folder, stage="pretrain")  # an artifact of the same stage may be replaced
  >>> sorted(versions())[:2]
  ['flax', 'jax']
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llmctl.artifacts import adapters, array_store, sparse_storage
from llmctl.artifacts.atomic import size, writing
from llmctl.artifacts.fingerprint import digest, manifest_fields
from llmctl.artifacts.manifest import ADAPTER_FORMAT, FORMAT, SPARSE_FORMAT, Manifest
from llmctl.artifacts.manifest_file import read_manifest, write_manifest
from llmctl.config import containment
from llmctl.config.errors import RequestError, WorkError
from llmctl.distributed import locks
from llmctl.model.config import ModelConfig

FILES = {
    *("manifest.json", "params", "tokenizer", "log.jsonl"),
    *("results.json", "table.md", "tradeoff.png", "predictions.jsonl", "importance.png"),
    *("example_values.jsonl", "comparisons.json"),
}
"""Names of the files and folders that stages write into an artifact's folder."""


def check_output(out: Path, *reads: Path, stage: str = "", replace: bool = False) -> None:
    """Check that an artifact may be written to `out`.

    Args:
        out: Output folder.
        reads: Input folders of the stage.
        stage: Kind of the stage that writes the artifact, such as pretrain. An artifact of the same kind may be
            replaced.
        replace: Whether to replace an artifact of any kind.

    Raises:
        RequestError: If the path of `out` has a character that globs interpret. If `out` is or contains a folder of
            `reads`. If `out` exists and is neither empty nor an artifact. If `replace` is false, and `out` is an
            artifact of another kind of stage. If `replace` is false, and `out` contains files that llmctl did not
            write.
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
    generation: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    tokenizer_dir: Path | None = None,
    log: Path | None = None,
    beside: Sequence[Path] = (),
    written: Path | None = None,
    pruned: bool | None = None,
    sparse: bool | None = None,
    rounded: bool = False,
    base: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
) -> Manifest:
    """Save an artifact to `out` atomically, and return its manifest.

    Args:
        out: Output folder; an existing artifact is replaced.
        params: Parameter tree. If `written` is given, `params` is a flat mapping {path: weight}, which is read one
            weight at a time.
        model: Model config, which must define the shapes of the parameters.
        stage: Kind of the stage, such as pretrain or prune.
        key: Hash of everything that can change the stage's result.
        config: Resolved config of the stage.
        name: Name of the artifact; by default the name of the folder `out`.
        parent: Manifest of the artifact that the stage started from.
        labels: Class names.
        task: Name of the task; by default the parent's task, if the parent has the same head.
        fitted: Values that the task fitted on validation data; by default the parent's values, if the parent has the
            same head.
        generation: Settings for generating answers; by default the parent's settings, if the parent has the same head.
        metrics: Measured metrics.
        tokenizer_dir: Tokenizer folder to copy.
        log: Log file to copy.
        beside: Further files to copy, such as pictures.
        written: Folder that contains the arrays in Orbax format. The folder is moved to `params/`.
        pruned: Whether zeros come from pruning. By default, the parent's value. If there is no parent, the default is
            whether the fraction of zeros exceeds `fingerprint.PRUNED`.
        sparse: Whether to store the pruned matrices in a sparse format (`llmctl.artifacts.sparse_storage`). By default,
            as in the parent.
        rounded: Whether the arrays are dequantized integers, which contain more zeros even without pruning.
        base: Parameters of the parent. If given, only arrays that the parent lacks are saved. The new artifact is then
            an adapter, and the parent is its base model.
        allow_nonfinite: Whether to save arrays that contain NaN or infinity.

    Raises:
        WorkError: If the disk is full. If an array contains NaN or infinity and `allow_nonfinite` is false. `out` is
            then unchanged.
        RequestError: If `base` is given and contains all arrays.
    """
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
        measured["pruned"] = (parent.pruned if parent else measured["pruned"]) if pruned is None else pruned
        sparse = bool(parent and parent.stores_sparse) if sparse is None else sparse
        if written:
            shutil.move(written, draft / "params")
        else:
            stored = _new_arrays(out, flat, base)
            if base and parent:
                named = adapters.names(stored)
                measured["base"] = adapters.base_record(parent, named, digest(named))
            elif sparse and measured["pruned"]:
                names = weights.value_names(weights.unflatten(flat))
                stored, measured["storage"] = sparse_storage.encode_all(stored, names)
            array_store.write(draft / "params", stored)
        like = parent if parent and parent.model.head == model.head else None
        manifest = Manifest(
            format=SPARSE_FORMAT if measured.get("storage") else ADAPTER_FORMAT if base else FORMAT,
            name=name or out.name,
            stage=stage,
            key=key,
            family=model.family,
            model=model.model_copy(update={"preset": ""}),
            labels=labels or [],
            task=(like.task if like else "") if task is None else task,
            fitted=(like.fitted if like else {}) if fitted is None else fitted,
            fitted_for=(like.fitted_for or like.name) if like and like.fitted and fitted is None else "",
            generation=generation_settings(like) if generation is None else generation,
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
            for file in beside:
                shutil.copy(file, draft / file.name)
        text = processes.broadcast(lambda: write_manifest(draft, manifest).model_dump_json())
    return Manifest.model_validate_json(text)


def copy(source: Path, out: Path, **record: Any) -> Manifest:
    """Copy the artifact at `source` to `out` atomically, change some manifest fields in the copy, and return its
    manifest.

    Args:
        source: Folder of the artifact.
        out: Output folder; an existing artifact is replaced.
        record: New values of manifest fields that cannot change predictions, such as the key, the config and the
            metrics.
    """
    from llmctl.distributed import processes

    changed = read_manifest(source).model_copy(update={"name": out.name, **record})
    with writing(out) as draft:
        if processes.first():
            shutil.copytree(source, draft, dirs_exist_ok=True)
        text = processes.broadcast(lambda: write_manifest(draft, changed).model_dump_json())
    return Manifest.model_validate_json(text)


def _new_arrays(out: Path, flat: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the arrays to write, {path of the weight: {name in the weight: array}}.

    The result has all arrays of the model or, for an adapter, only the arrays that the base lacks.

    Raises:
        RequestError: If the base has all arrays.
    """
    from llmctl.model import weights

    if base is None:
        return {path: weights.parts(w) for path, w in flat.items()}
    stored = adapters.stored_arrays(dict(base), flat)
    if not stored:
        raise RequestError(f"{out}: nothing was trained, so there is no adapter to save")
    return stored


def text_settings(config: Mapping[str, Any], parent: Manifest | None) -> dict[str, Any]:
    """Return the manifest fields "seq_len" and "truncate". Values that the stage's config lacks come from the parent.

    Args:
        config: Resolved config of the stage.
        parent: Manifest of the artifact that the stage starts from.
    """
    return {
        "seq_len": config.get("train", {}).get("seq_len") or (parent.seq_len if parent else 0),
        "truncate": config.get("truncate") or (parent.truncate if parent else ""),
    }


def generation_settings(manifest: Manifest | None) -> dict[str, Any]:
    """Return the settings for generating answers that finetuning stored in an artifact; {} if there are none.

    In artifacts that an earlier version of llmctl saved, these settings are only in the config of the finetuning stage.
    """
    if manifest is None:
        return {}
    return manifest.generation or manifest.config.get("generation", {})


def versions() -> dict[str, str]:
    """Return the versions of the libraries that determine an artifact's content, by package name."""
    return {p: metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint", "qwix")}
