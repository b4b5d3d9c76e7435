"""Build the device mesh, and shard arrays over the mesh. One table of rules maps the logical axes of arrays to mesh
axes.

Example:
  >>> from llmctl.config.settings import MeshConfig
  >>> mesh = make(MeshConfig(data=1, tensor=2), jax.devices()[:2])
  >>> spec(("embed", "mlp"), mesh) == PartitionSpec(None, "tensor")
  True
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import device_order, host_memory

Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stubs: this has no type

AXES = ("pipeline", "data", "fsdp", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    # after the last pipeline stage, where all stages would otherwise compute the same
    "batch_out": ("data", "fsdp", "pipeline"),
    "seq": ("context",),
    # Parameters: the fsdp axis shards the residual stream's width, and the tensor axis shards a layer's wide dimension.
    # Context parallel devices shard parameters as well, because they would otherwise hold copies.
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # The input embedding has its own axes: XLA rematerializes a gather in full if its table is sharded on both axes.
    "vocab_in": ("tensor",),
    "embed_in": ("fsdp", "context"),
    "layers": ("pipeline",),
    "norm": (),
    "labels": (),
    # Activations: the residual stream is replicated within a tensor parallel group.
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}
"""Sharding rules: logical axis name -> mesh axes. A logical axis name, such as "embed", describes a dimension of an
array. To change a layout, change a row of this table."""

_current: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def make(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Build a device mesh with the axes pipeline, data, fsdp, context and tensor. All axes have JAX's axis type Auto.

    On the CPU platform with default settings, the mesh has one device. More (fake) CPU devices would only split the
    same cores. On CPUs, the process also keeps freed memory (`host_memory.keep`).

    Args:
        config: Number of devices per axis; -1 uses the remaining devices.
        devices: Devices to use; all devices by default.

    Raises:
        RequestError: If the product of the axis sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    if devices[0].platform == "cpu":
        host_memory.keep()
    if devices[0].platform == "cpu" and config == MeshConfig() and jax.process_count() == 1:
        devices = devices[:1]
    known = math.prod(s for s in sizes if s > 0)
    if sizes.count(-1) > 1 or 0 in sizes:
        raise RequestError(f"mesh: one axis at most may be -1 and none 0, got {_show(sizes)}")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise RequestError(
            f"mesh: {_show(sizes)} does not fit {len(devices)} {devices[0].platform} devices; "
            "change [mesh] so that the axes multiply to that number (-1 takes what is left)"
        )
    placed = device_order.arrange(devices, AXES, sizes, config.dcn)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _show(sizes: Sequence[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Set `mesh` as the current mesh while the context lasts. `constrain` reads the current mesh during tracing."""
    token = _current.set(mesh)
    try:
        yield mesh
    finally:
        _current.reset(token)


def current() -> Mesh | None:
    """Return the current mesh, or None if no mesh is set (see `use`)."""
    return _current.get()


def device() -> Device:
    """Return the first device of the current mesh. If there is no mesh, return JAX's default device."""
    mesh = current()
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def size() -> int:
    """Return the number of devices of the current mesh. If there is no mesh, return 1."""
    mesh = _current.get()
    return 1 if mesh is None else mesh.size


def axis_size(axis: str) -> int:
    """Return the number of devices along an axis of the current mesh. If there is no mesh, return 1."""
    mesh = _current.get()
    return 1 if mesh is None else mesh.shape[axis]


def splits_sequences() -> bool:
    """Return True if the current mesh shards sequences over devices (context parallelism)."""
    mesh = _current.get()
    return mesh is not None and mesh.shape["context"] > 1


def spec(names: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None) -> PartitionSpec:
    """Convert logical axis names to a PartitionSpec by the sharding rules.

    A mesh axis shards at most one dimension. Mesh axes of size 1 are omitted, and so are manual axes inside
    `shard_map`.

    Args:
        names: One logical axis name per dimension; None for a replicated dimension.
        mesh: The device mesh.
        shape: Shape of the array. If given, a dimension that cannot be divided evenly over its mesh axes is replicated.
    """
    used = set(jax.sharding.get_abstract_mesh().manual_axes)
    entries: list[tuple[str, ...] | None] = []
    for i, name in enumerate(names):
        axes = tuple(a for a in (RULES[name] if name else ()) if mesh.shape[a] > 1 and a not in used)
        if shape is not None and shape[i] % math.prod(mesh.shape[a] for a in axes):
            axes = ()
        used.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def axes_of(spec: PartitionSpec) -> list[str]:
    """Return the names of the mesh axes that a PartitionSpec uses."""
    return [axis for entry in spec if entry for axis in ([entry] if isinstance(entry, str) else entry)]


def sharding(names: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """Convert logical axis names to a NamedSharding on `mesh`."""
    return NamedSharding(mesh, spec(names, mesh))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation by the rules for its logical axes `names`, and return the activation.

    If there is no current mesh, or only one device, return the activation unchanged.
    """
    mesh = _current.get()
    if mesh is None or mesh.size == 1:
        return x
    inside = jax.sharding.get_abstract_mesh()
    where = NamedSharding(inside if inside.manual_axes else mesh, spec(names, mesh))
    return jax.lax.with_sharding_constraint(x, where)


def per_device(
    fn: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, automatic: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return a function that runs `fn` with `shard_map`: each device calls `fn` with its own shards of the arguments.

    `fn` may call `per_device` itself, for the mesh axes that are still automatic.

    Args:
        fn: Function of the shards of one device.
        mesh: The device mesh.
        in_specs: PartitionSpecs of the arguments.
        out_specs: PartitionSpecs of the results.
        automatic: Mesh axes over which XLA still partitions arrays automatically. All other axes are manual.
    """
    inside = jax.sharding.get_abstract_mesh()
    axes = set(AXES) - set(inside.manual_axes) - set(automatic)
    return jax.shard_map(
        fn,
        mesh=inside if inside.manual_axes else mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes,
        check_vma=False,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return the sharding of a batch array [B, ...] with `ndim` axes, of which only the first is sharded."""
    return sharding(["batch"] + [None] * (ndim - 1), mesh)
