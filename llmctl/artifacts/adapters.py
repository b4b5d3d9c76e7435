"""Combine an adapter, such as a LoRA adapter, with its base model.

An adapter is an artifact that contains only the arrays that another artifact lacks.

The other artifact is called the base. The manifest of an adapter describes the complete model. The manifest also
contains the digest of the base (`manifest.Base`), but not the path of the base. Artifacts do not refer to files outside
their folders. The folder of the base is found by this digest. The search covers the folders that the user names or, if
there are none, the folders next to the adapter.

A weight may consist of several named arrays, such as a matrix and the factors `a` and `b` of LoRA. The functions below
represent the arrays of a model as {path of the weight: {name in the weight: array}}.

Example:
  >>> selected({"head/out/kernel": {"": 1}, "embed/tokens": {"base": 2, "a": 3}}, ["embed/tokens:a"])
  {'embed/tokens': {'a': 3}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.artifacts.manifest import NAME, Base, Manifest
from llmctl.artifacts.manifest_file import ADVICE, read_manifest
from llmctl.config.errors import RequestError


def find_base(path: Path, manifest: Manifest, bases: Sequence[Path] = ()) -> Path:
    """Find the base of an adapter, and return its folder.

    Args:
        path: Folder of the adapter.
        manifest: Manifest of the adapter.
        bases: Folders that the user named. If there are none, the folders next to the adapter are searched.

    Raises:
        RequestError: If no folder has the base's digest.
    """
    base = manifest.base
    assert base is not None
    named = {Path(folder): read_manifest(folder) for folder in bases}
    for folder, found in named.items():
        if base.is_of(found):
            return folder
    for folder, found in _beside(path).items():
        if base.is_of(found) and (not named or found.base):  # the named folder may be the base of this base
            return folder
    wanted = f"{base.name} (digest {(base.content or base.digest)[:12]})"
    for folder, found in named.items():
        digest = (found.content or found.digest)[:12]
        raise RequestError(f"{path}: its base is {wanted}, and --base {folder} has the digest {digest}")
    raise RequestError(f"{path}: its base {wanted} is not beside it; --base names its folder")


def check_bases(paths: Sequence[Path], bases: Sequence[Path]) -> None:
    """Check that base folders are given only if at least one of the artifacts `paths` is an adapter.

    Raises:
        RequestError: If `bases` is not empty and no artifact is an adapter.
    """
    if bases and not any(read_manifest(path).base for path in paths):
        raise RequestError(f"--base {bases[0]}: {', '.join(map(str, paths))} is no adapter, which alone has a base")


def _beside(path: Path) -> dict[Path, Manifest]:
    """Return the readable artifacts in the folder that contains `path`, with their manifests."""
    found: dict[Path, Manifest] = {}
    for parent in dict.fromkeys((path.absolute().parent, path.resolve().parent)):
        for file in sorted(parent.glob(f"[!.]*/{NAME}")):
            try:
                found[file.parent] = read_manifest(file.parent)
            except (RequestError, OSError):  # a damaged artifact is nobody's base
                continue
    return found


def stored_arrays(base: dict[str, Any], flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arrays in which a model differs from its base: {path of the weight: {name in the weight: array}}.

    The result has the arrays that the base lacks, and the arrays that have other values in the base.

    Args:
        base: Parameters of the base. Arrays that training has replaced may be deleted.
        flat: Weights of the model by path.
    """
    import numpy as np

    from llmctl.model import weights

    theirs = weights.flatten(base)

    def is_theirs(a: Any, b: Any) -> bool:
        if a is b:
            return True
        if b is None or b.is_deleted() or (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        return bool(np.asarray(_equal(a, b)))

    out: dict[str, dict[str, Any]] = {}
    for path, w in flat.items():
        inner = weights.parts(theirs[path]) if path in theirs else {}
        own = {part: a for part, a in weights.parts(w).items() if not is_theirs(a, _twin(inner, part))}
        if own:
            out[path] = own
    return out


def _equal(a: Any, b: Any) -> Any:
    import jax.numpy as jnp

    return jnp.array_equal(a, b)


def _twin(parts: Mapping[str, Any], part: str) -> Any:
    """Return the base's array that corresponds to the array `part` of an adapted weight; None if there is none.

    Args:
        parts: Arrays of the same weight in the base, by name.
        part: Name of the array in the adapted weight, such as "base.scale" for the array "scale" of the base's weight.
    """
    from llmctl.model import weights

    return parts.get(part, parts.get(weights.base_part(part)))


def names(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Convert arrays {path of the weight: {name in the weight: array}} to {full name: array}, sorted by full name.

    A full name is PATH:NAME, such as `embed/tokens:a`, or PATH alone if the weight is a plain array.
    """
    from llmctl.model import weights

    return dict(sorted((weights.join(path, part), a) for path, parts in stored.items() for part, a in parts.items()))


def selected(arrays: Mapping[str, Mapping[str, Any]], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the entries of `arrays` whose full names (see `names`) are in `stored`.

    Argument and result have the form {path of the weight: {name in the weight: array}}.
    """
    from llmctl.model import weights

    chosen, out = {*stored}, {}
    for path, parts in arrays.items():
        if own := {part: a for part, a in parts.items() if weights.join(path, part) in chosen}:
            out[path] = own
    return out


def composed(
    manifest: Manifest, target: dict[str, Any], stored: Mapping[str, Any], base: dict[str, Any]
) -> dict[str, Any]:
    """Combine the arrays of an adapter and its base, and return the parameters of the complete model.

    Arrays of the base are not copied if they already have the sharding of `target`.

    Args:
        manifest: Manifest of the adapter.
        target: Shapes, dtypes and shardings of the model's parameters.
        stored: Arrays of the adapter by name.
        base: Parameters of the base.

    Raises:
        RequestError: If an array is missing in both the adapter and the base. If the shape or dtype of an array differs
            from `target`.
    """
    import jax

    from llmctl.model import weights

    theirs, out = weights.flatten(base), {}
    for path, w in weights.flatten(target).items():
        inner, arrays = weights.parts(theirs[path]) if path in theirs else {}, {}
        for part, wanted in weights.parts(w).items():
            name = weights.join(path, part)
            a = stored[name] if name in stored else _twin(inner, part)
            if a is None or (a.shape, a.dtype) != (wanted.shape, wanted.dtype):
                raise RequestError(f"{manifest.name}: damaged (neither it nor its base has the array {name}); {ADVICE}")
            same = a.sharding.is_equivalent_to(wanted.sharding, a.ndim)
            arrays[part] = a if same else jax.device_put(a, wanted.sharding)
        out[path] = weights.assemble(manifest.weights[path], arrays)
    return weights.unflatten(out)


def base_record(base: Manifest, stored: Mapping[str, Any], digest: str) -> Base:
    """Return the manifest entry that describes the base of a new adapter.

    Args:
        base: Manifest of the base.
        stored: Arrays that the adapter's own folder contains, by name.
        digest: Digest of the arrays in `stored`.
    """
    identity = base.as_parent().model_dump()
    return Base(**identity, stored=sorted(stored), stored_digest=digest, sparse=base.stores_sparse)
