"""Read and write artifacts: folders with `manifest.json`, parameters in `params/` (Orbax) and a tokenizer.

An artifact is written to a temporary folder, which is then renamed. An artifact is therefore never incomplete. The
manifest lists the type and shape of every array, so arrays can be restored onto any mesh. `load` checks the digests of
the manifest's fields, the tokenizer's files and the arrays. An adapter is an artifact that contains only the arrays
that another artifact, its base, lacks (`llmctl.artifacts.adapters`). `load` then reads both folders.

Example:
  >>> found = load(folder)
  >>> found.model.family, found.manifest.stage, sorted(found.params)
  ('llama', 'pretrain', ['decoder', 'embed'])
  >>> abstract(folder).params["decoder"]["norm"]["scale"].dtype
  dtype('float32')
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import adapters, array_store
from llmctl.artifacts.fingerprint import digest
from llmctl.artifacts.manifest import FORMAT, Manifest, Parent
from llmctl.artifacts.manifest_file import ADVICE, damaged_files, listed, read_manifest, write_manifest
from llmctl.artifacts.saving import check_output, generation_settings, save, text_settings, versions
from llmctl.config import limits
from llmctl.config.errors import RequestError
from llmctl.model.config import ModelConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = [
    "FORMAT",
    "Artifact",
    "Manifest",
    "Parent",
    "abstract",
    "check_output",
    "generation_settings",
    "load",
    "load_each",
    "read_manifest",
    "save",
    "text_settings",
    "versions",
    "write_manifest",
]


@dataclass(frozen=True)
class Artifact:
    """Store a loaded artifact: its folder, its manifest and its parameter tree.

    `load` returns an artifact with arrays. `abstract` returns an artifact with shapes, dtypes and shardings in place of
    arrays.
    """

    path: Path
    manifest: Manifest
    params: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        """Return the model config, which defines the shapes of the parameters."""
        return self.manifest.model

    @property
    def plain(self) -> bool:
        """Return True if every weight is a plain array, and False if any weight is quantized or has an adapter."""
        return all("" in record["parts"] for record in self.manifest.weights.values())

    @property
    def zeros(self) -> frozenset[str]:
        """Return the names of arrays whose zeros later training must keep.

        If the model was pruned, these are the matrices of the layers. Otherwise the set is empty.
        """
        from llmctl.model import weights

        return weights.zero_names(self.params) if self.manifest.pruned else frozenset()

    @property
    def tokenizer_dir(self) -> Path:
        """Return the folder of the tokenizer."""
        return self.path / "tokenizer"


def load(
    path: Path,
    mesh: Mesh | None = None,
    *,
    bases: Sequence[Path] = (),
    loaded: dict[str, Artifact] | None = None,
) -> Artifact:
    """Load an artifact: its manifest and its parameters, sharded over `mesh` by the sharding rules.

    Args:
        path: Folder of the artifact.
        mesh: Target mesh; by default the mesh of the default `MeshConfig`.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.
        loaded: Base artifacts that were loaded on this mesh before, by content digest. If this call loads a base, the
            base is added.

    Raises:
        RequestError: If the folder is no artifact or is damaged. If the arrays do not fit the mesh or the memory. If
            the base of an adapter is missing.
    """
    import jax

    from llmctl.model import weights
    from llmctl.model.array_bytes import bytes_of

    there = abstract(path, mesh)
    base, about = there.manifest.base, there.manifest
    _check_files(path, about)
    flat = weights.flatten(there.params)
    target = {name: weights.parts(w) for name, w in flat.items()}
    if base:
        target = adapters.selected(target, base.stored)
    sparse = array_store.sparse_parts(there.path, target, about.storage)
    devices = sum((d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices())
    share = bytes_of(target, whole=True) // jax.process_count() + bytes_of(sparse, whole=True)
    limits.check_memory(share - devices, f"{path}: its arrays", "use more devices or processes")
    if not base:
        arrays = array_store.read(there.path, target, about.storage)
        params = {name: weights.assemble(about.weights[name], arrays[name]) for name in target}
        _check_digest(path, digest(params), about.digest)
        return replace(there, params=weights.unflatten(params))
    below = _base(there, mesh, bases, {} if loaded is None else loaded)
    stored = adapters.names(array_store.read(there.path, target))
    _check_digest(path, digest(stored), base.stored_digest)
    return replace(there, params=adapters.composed(about, there.params, stored, below.params))


def _base(adapter: Artifact, mesh: Mesh | None, bases: Sequence[Path], loaded: dict[str, Artifact]) -> Artifact:
    """Return the loaded base of an adapter, and add it to `loaded`."""
    base = adapter.manifest.base
    assert base is not None
    folder = adapters.find_base(adapter.path, adapter.manifest, bases)  # its absence is an error even if it is loaded
    key = base.content or base.digest
    if key not in loaded:
        others = [b for b in bases if Path(b) != folder]
        loaded[key] = load(folder, mesh, bases=others, loaded=loaded)
    return loaded[key]


def load_each(paths: Sequence[Path], mesh: Mesh | None = None, *, bases: Sequence[Path] = ()) -> Iterator[Artifact]:
    """Load artifacts one after the other. If several adapters have the same base, the base is loaded once.

    Args:
        paths: Folders of the artifacts.
        mesh: Target mesh; by default the mesh of the default `MeshConfig`.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.

    Yields:
        The artifacts, in the order of `paths`.

    Raises:
        RequestError: If an artifact cannot be loaded (see `load`).
    """
    manifests = [read_manifest(path) for path in paths]
    shared = {m.base.content or m.base.digest for m in manifests if m.base}
    loaded: dict[str, Artifact] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        key = manifest.content or manifest.digest
        if key in loaded:
            _check_files(path, manifest)  # its arrays are not read, but its tokenizer may be
        found = loaded.get(key) or load(path, mesh, bases=bases, loaded=loaded)
        if key in shared:
            loaded[key] = found
        yield replace(found, path=Path(path), manifest=manifest)


def _check_files(path: Path, manifest: Manifest) -> None:
    """Check the files of an artifact's tokenizer.

    Raises:
        RequestError: If a file differs from its checksum.
    """
    if wrong := damaged_files(Path(path), manifest, "content"):
        raise RequestError(f"{path}: damaged ({listed(wrong.values())}); {ADVICE}")


def _check_digest(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise RequestError(f"{path}: damaged (params: the digest differs from the manifest's); {ADVICE}")


def abstract(path: Path, mesh: Mesh | None = None) -> Artifact:
    """Load an artifact with shapes, dtypes and shardings in place of arrays. Only the manifest is read.

    Args:
        path: Folder of the artifact.
        mesh: Target mesh; by default the mesh of the default `MeshConfig`.

    Raises:
        RequestError: If the folder is no artifact, is damaged or has no parameters. If the arrays would not fit the
            mesh.
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
        reason = array_store.first_line(str(e))
        raise RequestError(f"{path}: damaged (the record of {name}: {reason}); {ADVICE}") from None
    _check_layers(path, manifest)
    _check_shapes(path, nodes, weights.flatten(functional.abstract(manifest.model)))
    return Artifact(path, manifest, functional.laid_out(manifest.model, weights.unflatten(nodes), mesh))


def _check_layers(path: Path, manifest: Manifest) -> None:
    """Check that the number of layers in the model config is not larger than in the stored arrays.

    Otherwise, a damaged config could request millions of layers, and one object would be created per layer.

    Raises:
        RequestError: If the config has more layers.
    """
    shapes = [shape for record in manifest.weights.values() for _, shape in record["parts"].values()]
    layers, most = manifest.model.layers, max((shape[0] for shape in shapes if shape), default=0)
    if layers > most:
        raise RequestError(f"{path}: the model config has {layers:,} layers, and no array has so many; it is damaged")


def _check_shapes(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that the stored arrays have the names and shapes that the model config defines.

    Raises:
        RequestError: If names or shapes differ, or if an array of a weight, such as its scales, has a wrong shape.
    """
    from llmctl.model import weights

    odd = sorted(stored.keys() ^ expected.keys())
    odd += [k for k in stored.keys() & expected.keys() if tuple(stored[k].shape) != tuple(expected[k].shape)]
    if odd:
        raise RequestError(
            f"{path}: parameters contradict the model config at {', '.join(odd[:4])}; the artifact is damaged"
        )
    for name, w in stored.items():
        if part := weights.as_node(w).misfit():
            shape = list(weights.parts(w)[part].shape)
            wrong = f"{part} of {name} has the shape {shape}, which does not fit {list(w.shape)}"
            raise RequestError(f"{path}: damaged ({wrong}); {ADVICE}")
