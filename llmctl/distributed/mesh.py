"""The device mesh and the one table that decides sharding: logical axis name -> mesh axes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import context_parallel, device_order, host_arrays, host_memory, processes

Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stubs: this has no type

AXES = ("pipeline", "data", "fsdp", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "batch_out": ("data", "fsdp", "pipeline"),  # after the last stage, where all would compute the same
    "seq": ("context",),
    # Parameters: the fsdp axis splits the width of the residual stream, the tensor axis what a layer fans out to.
    # Devices that share a sequence share the parameters as well: they would hold the same ones.
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # The input table has axes of its own: a gather over a table split on both is what XLA rematerializes in full.
    "vocab_in": ("tensor",),
    "embed_in": ("fsdp", "context"),
    "layers": ("pipeline",),
    "norm": (),
    "labels": (),
    # Activations: the residual stream is whole on every device of a tensor group.
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

_current: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def make(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh over all devices (axes `AXES`, type Auto).

    Raises RequestError where the axes do not multiply to the number of devices. One CPU is left to itself: with every
    axis at its default, the CPU platform gets one device, for fake devices only split the same cores. The memory of
    CPUs is kept (`pages.keep`).
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
    """Makes `mesh` the one that `constrain` refers to while a computation is traced."""
    token = _current.set(mesh)
    try:
        yield mesh
    finally:
        _current.reset(token)


def current() -> Mesh | None:
    """The mesh in `use`."""
    return _current.get()


def splits_sequences() -> bool:
    """Whether the mesh in `use` does."""
    mesh = _current.get()
    return mesh is not None and mesh.shape["context"] > 1


def spec(names: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None) -> PartitionSpec:
    """Logical axis names -> PartitionSpec; mesh axes of size 1 are left out, and none is used twice.

    Inside `per_device` its axes are left out too; where a shape is given, so are those that do not divide it.
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
    """The mesh axes of a PartitionSpec."""
    return [axis for entry in spec if entry for axis in ([entry] if isinstance(entry, str) else entry)]


def sharding(names: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """Logical axis names -> NamedSharding on `mesh`."""
    return NamedSharding(mesh, spec(names, mesh))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to the rules of its logical axes; does nothing outside `use` or on one device."""
    mesh = _current.get()
    if mesh is None or mesh.size == 1:
        return x
    inside = jax.sharding.get_abstract_mesh()
    where = NamedSharding(inside if inside.manual_axes else mesh, spec(names, mesh))
    return jax.lax.with_sharding_constraint(x, where)


def per_device(
    fn: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, automatic: Sequence[str] = ()
) -> Callable[..., Any]:
    """`fn` on every device's own part (`shard_map`), over all axes but those left to XLA; may stand inside another."""
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
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """The sharding of a batch array [B, ...]."""
    return sharding(["batch"] + [None] * (ndim - 1), mesh)


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """How the arrays of a batch lie: split over its rows and, those that run along it, over the sequence."""

    def names(name: str, ndim: int) -> list[str | None]:
        return (["batch", "seq" if context_parallel.runs_along(name) else None] + [None] * ndim)[:ndim]

    return {name: sharding(names(name, a.ndim), mesh) for name, a in batch.items()}


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host rows, the same in every process -> device arrays, in balanced order where devices share a sequence.

    `llmctl.data.device_batches` places rows that each process built for itself.
    """
    batch = context_parallel.balanced(batch, mesh.shape["context"])
    shardings = batch_shardings(batch, mesh)
    if processes.count() > 1:
        return {k: host_arrays.put(a, shardings[k]) for k, a in batch.items()}
    return jax.device_put(batch, shardings)
