"""Read and write the folder `params/` of an artifact, in Orbax format.

The functions represent the arrays of a model as {path of the weight: {name in the weight: array}}. Pruned arrays may be
stored in a sparse format (`llmctl.artifacts.sparse_storage`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmctl.artifacts import adapters, orbax_logging, sparse_storage
from llmctl.artifacts.manifest_file import ADVICE
from llmctl.config.errors import RequestError

Arrays = Mapping[str, Mapping[str, Any]]


def write(folder: Path, arrays: Arrays) -> None:
    """Write arrays to a new folder, as an Orbax checkpoint."""
    import orbax.checkpoint as ocp

    from llmctl.distributed import host_memory
    from llmctl.model import weights

    host_memory.trim()
    tree = weights.unflatten({path: _plain(parts) for path, parts in arrays.items()})
    # By default, Orbax copies and compresses all arrays at the same time.
    handler = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=max(_sizes(tree)) + 1)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))


def sparse_parts(path: Path, target: Arrays, storage: Mapping[str, sparse_storage.Record]) -> dict[str, Any]:
    """Allocate host arrays for reading the arrays that are stored in a sparse format.

    The result is {name of the dense array: {name of the part: array}}. Examples of parts are "bitmask" and "values".

    Args:
        path: Folder of the artifact, for error messages.
        target: Abstract dense arrays.
        storage: Records of the manifest, by name of the array.

    Raises:
        RequestError: If a record does not describe an array of `target`.
    """
    named, found = adapters.names(target), {}
    for name, record in storage.items():
        try:
            if name not in named:
                raise ValueError("there is no such array")
            found[name] = sparse_storage.stored(record, named[name].shape, named[name].dtype)
        except ValueError as e:
            raise RequestError(f"{path}: damaged (the storage of {name[:80]}: {e}); {ADVICE}") from None
    return found


def read(
    path: Path, target: Arrays, storage: Mapping[str, sparse_storage.Record] | None = None
) -> dict[str, dict[str, Any]]:
    """Read arrays of the artifact `path`, with the shapes, dtypes and shardings of `target`.

    Args:
        path: Folder of the artifact.
        target: Abstract arrays.
        storage: Records of the arrays in a sparse format, by name.

    Raises:
        RequestError: If the folder is damaged.
    """
    import orbax.checkpoint as ocp

    from llmctl.distributed import host_arrays, host_memory
    from llmctl.model import weights

    orbax_logging.silence_late_errors()
    sparse = sparse_parts(path, target, storage or {})
    there = {
        name: _plain({part: sparse.get(weights.join(name, part), a) for part, a in own.items()})
        for name, own in target.items()
    }
    out: dict[str, dict[str, Any]] = {}
    for names in _groups(there):
        wanted = weights.unflatten({name: there[name] for name in names})
        args = ocp.checkpoint_utils.construct_restore_args(wanted)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restore = ocp.args.PyTreeRestore(wanted, restore_args=args, partial_restore=True)
                tree = checkpointer.restore((path / "params").absolute(), args=restore)
        except Exception as e:  # Orbax and TensorStore raise many types for a damaged or truncated store
            raise RequestError(f"{path}: damaged (params: {first_line(str(e))}); {ADVICE}") from e
        for name in names:
            own, found = target[name], _lookup(tree, name)
            out[name] = {"": found} if "" in own else dict(found)
            for part, a in own.items():
                full = weights.join(name, part)
                if storage and full in sparse:
                    try:
                        dense = sparse_storage.decode(storage[full], out[name].pop(part), a.shape)
                    except ValueError as e:
                        raise RequestError(f"{path}: damaged (params: {full}: {e}); {ADVICE}") from None
                    out[name][part] = host_arrays.put(dense, a.sharding)
        host_memory.trim()
    return out


def _groups(arrays: Mapping[str, Any]) -> Iterator[list[str]]:
    """Divide the weights into groups that are read one after the other, and yield the names in each group.

    A group has at most a quarter of the bytes of all weights. A larger weight is a group by itself.

    Orbax keeps a decompressed copy of every array that it is reading. If all arrays were read together, loading would
    need twice the memory of the arrays.

    Args:
        arrays: Arrays of each weight, as Orbax stores them.
    """
    sizes = {name: sum(_sizes(own)) for name, own in arrays.items()}
    group: list[str] = []
    for name in sizes:
        if group and 4 * sum(sizes[n] for n in [*group, name]) > sum(sizes.values()):
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _sizes(arrays: Any) -> list[int]:
    """Return the size in bytes of each array of a tree. An int4 element counts as one byte, as in NumPy."""
    import jax
    import numpy as np

    return [a.size * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(arrays)]


def first_line(text: str) -> str:
    """Shorten an error message to one line of at most 200 characters, without the details that TensorStore appends."""
    return " ".join(text.partition(". See full TensorStore details")[0].split())[:200]


def _plain(parts: dict[str, Any] | Mapping[str, Any]) -> Any:
    """Return the arrays of a weight as Orbax stores them: one array for a plain weight, otherwise the dict `parts`. The
    array of a plain weight has the name "" in `parts`.
    """
    return parts.get("", parts)


def _lookup(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree
