"""Run layers as a pipeline: each device has a stage of consecutive layers, and microbatches pass through all stages
(GPipe; Huang et al., 2018, arXiv:1811.06965).

The pipeline is one compiled program, in which the stages are distributed over the mesh axis `pipeline`. In each
iteration, every stage runs its layers on a different microbatch and sends the result to the next stage. M microbatches
pass through P stages in M + P - 1 iterations. Each stage is idle in P - 1 iterations (the bubble). Automatic
differentiation runs the same schedule backwards. Only the residual stream and, in an encoder-decoder, the encoder's
output are sent. Microbatch m consists of rows m, m + M, …, so that each device keeps its own rows.

Shapes: B batch, M microbatches, b rows per microbatch, P stages, L layers, T sequence, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from llmctl.distributed import mesh as meshes
from llmctl.model.attention import Shared

Tree = Any
Layer = Callable[..., jax.Array]
"""Function that applies one layer to an input [b, T, D], and returns the output [b, T, D].

The arguments are the layer's parameters, the input, the inputs that all layers share, and further inputs of this layer.
"""

PER_STAGE = 4
"""Default maximum number of microbatches per stage. Each stage is then idle for about one fifth of the time."""

_wanted: ContextVar[int] = ContextVar("microbatches", default=0)


@contextlib.contextmanager
def use(microbatches: int) -> Iterator[None]:
    """Set the maximum number of microbatches for computations that are traced in a `with` block.

    0 means `PER_STAGE` microbatches per pipeline stage.
    """
    token = _wanted.set(microbatches)
    try:
        yield
    finally:
        _wanted.reset(token)


def stages() -> int:
    """Return the number of pipeline stages of the current mesh."""
    mesh = meshes.current()
    return 1 if mesh is None else mesh.shape["pipeline"]


def microbatches(batch: int, mesh: Mesh, wanted: int = 0) -> int:
    """Return the largest number of microbatches that is at most `wanted` and divides the number of rows per device.

    If `wanted` is 0, the maximum is `PER_STAGE` times the number of stages. `batch` is the number of rows over all
    devices.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = batch // ways if batch % ways == 0 else batch
    most = wanted or PER_STAGE * mesh.shape["pipeline"]
    return max(m for m in range(1, min(rows, most) + 1) if rows % m == 0)


def describe(batch: int, mesh: Mesh, wanted: int) -> list[str]:
    """Return a list with one log line that describes the pipeline; an empty list if the mesh has no pipeline."""
    P = mesh.shape["pipeline"]
    if P == 1:
        return []
    M = microbatches(batch, mesh, wanted)
    bubble = (P - 1) / (M + P - 1)
    return [f"pipeline: {P} stages, {M} microbatches of {batch // M} sequences; idle {bubble:.1%} of the time (bubble)"]


def run(layer: Layer, params: Tree, own: tuple[Tree, ...], x_BTD: jax.Array, shared: Shared) -> jax.Array:
    """Run the stack of layers as a pipeline on the current mesh.

    `shard_map` makes the mesh axes `pipeline` and `data` manual; XLA shards over the other axes. Gradients of a stage's
    parameters therefore accumulate locally. These gradients are summed over the replicas once, after the last
    iteration.

    Args:
        layer: Function that applies one layer (see `Layer`).
        params: Layer parameters with a leading axis of layers [L, ...].
        own: Further inputs that differ per layer, such as dropout keys, with the same leading axis.
        x_BTD: Input of the first layer.
        shared: Inputs that all layers share, such as masks.

    Returns:
        Output of the last layer [B, T, D].
    """
    mesh = meshes.current()
    assert mesh is not None
    M = microbatches(len(x_BTD), mesh, _wanted.get())
    rows = PartitionSpec("data" if len(x_BTD) % mesh.shape["data"] == 0 else None)
    whole = {name: getattr(shared, name) for name in Shared._fields if name.startswith("bias")}
    moving, still = (x_BTD, shared.memory_BSD), shared._replace(memory_BSD=None, **dict.fromkeys(whole))
    stage, everywhere = PartitionSpec("pipeline"), PartitionSpec()
    here = jax.shard_map(
        partial(_stage, layer, mesh.shape["pipeline"], M),
        mesh=mesh,
        in_specs=(stage, rows, rows, everywhere),
        out_specs=rows,
        axis_names={"pipeline", "data"},
        check_vma=False,
    )
    x_BTD = here((params, own), moving, still, whole)
    return meshes.constrain(x_BTD, "batch", "seq", "act_embed")


def _stage(layer: Layer, P: int, M: int, layers: Tree, moving: Tree, still: Shared, whole: Tree) -> jax.Array:
    """Run the layers of one stage on all microbatches of a data-parallel replica.

    Args:
        layer: Function that applies one layer (see `Layer`).
        P: Number of stages.
        M: Number of microbatches.
        layers: Parameters and per-layer inputs of this stage.
        moving: Arrays [M * b, ...] that each stage sends to the next: hidden states, and the encoder's output.
        still: Shared inputs with a row per sequence, such as masks. Every stage selects the rows of its microbatch.
        whole: Shared inputs without rows, which are the same for all microbatches: position biases.

    Returns:
        The output of the last stage for all microbatches.
    """
    stage = jax.lax.axis_index("pipeline")
    entering = jax.tree.map(partial(_split, M, "seq"), moving)
    still = jax.tree.map(partial(_split, M, None), still)
    # The padding at the end is never read.
    entering = jax.tree.map(lambda a: jnp.concatenate([a, *[a[:1]] * (P - 1)]), entering)

    def tick(made: Tree, now: Tree) -> tuple[Tree, jax.Array]:
        new, at = now
        moving = jax.tree.map(lambda new, old: jnp.where(stage == 0, new, _send_to_next(P, old)), new, made)
        # Also constrains its gradient.
        moving = jax.tree.map(lambda a: meshes.constrain(a, "batch", "seq", "act_embed"), moving)
        piece = jnp.clip(at - stage, 0, M - 1)
        here = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, piece, keepdims=False), still)
        here = here._replace(memory_BSD=moving[1], **whole)
        x = jax.lax.scan(lambda x, each: (layer(each[0], x, here, *each[1]), None), moving[0], layers)[0]
        return (x, moving[1]), x

    # Start with real rows, because NaN in the bubble would also survive a multiplication by zero.
    begin = jax.tree.map(lambda a: a[0], entering)
    _, made = jax.lax.scan(tick, begin, (entering, jnp.arange(M + P - 1)))
    x_MbTD = jnp.where(stage == P - 1, made[P - 1 :], 0)
    x_MbTD = jax.lax.psum(x_MbTD, "pipeline")
    return x_MbTD.swapaxes(0, 1).reshape(-1, *x_MbTD.shape[2:])


def _split(M: int, along: str | None, a: jax.Array) -> jax.Array:
    """Split an array [B, X, ...] into M microbatches, [M, b, X, ...]. `along` is the logical axis of X."""
    a = a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1)
    return meshes.constrain(a, *[None, "batch", along, None][: a.ndim])


def _send_to_next(P: int, a: jax.Array) -> jax.Array:
    """Send an array to the next stage. The first stage receives zeros, which it does not read."""
    return jax.lax.ppermute(a, "pipeline", [(i, i + 1) for i in range(P - 1)])


def spread(x_BTD: jax.Array) -> jax.Array:
    """Shard the rows of the pipeline's output over the stages, so that each stage computes the head for some rows."""
    mesh = meshes.current()
    if stages() == 1 or mesh is None or len(x_BTD) % (mesh.size // mesh.shape["tensor"]):
        return x_BTD
    return meshes.constrain(x_BTD, "batch_out", "seq", "act_embed")
