"""Stages of layers on successive devices, and microbatches that follow one another through them (arXiv:1811.06965).

It is one program: the stages are an axis of the state, split over the mesh's `pipeline`. At each tick every stage runs
its layers on another microbatch and hands the result to the next stage. M microbatches leave P stages after M + P - 1
ticks, of which P - 1 are each stage's bubble; automatic differentiation runs the same schedule backwards. Only the
residual stream (and an encoder's memory) moves. Microbatch m has the rows m, m + M, …: each device keeps its own.

Shapes: B batch, M microbatches, b rows of one, P stages, L layers, T sequence, D model width.
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
"""(parameters of a layer, x [b, T, D], what the layers share, *what is the layer's own) -> x [b, T, D]."""

A_STAGE = 4
"""Microbatches a stage at most where nobody says how many: a bubble of a fifth."""

_wanted: ContextVar[int] = ContextVar("microbatches", default=0)


@contextlib.contextmanager
def use(microbatches: int) -> Iterator[None]:
    """While a computation is traced: so many microbatches at most; 0 takes up to A_STAGE a stage."""
    token = _wanted.set(microbatches)
    try:
        yield
    finally:
        _wanted.reset(token)


def stages() -> int:
    """Stages of the mesh in use."""
    mesh = meshes.current()
    return 1 if mesh is None else mesh.shape["pipeline"]


def microbatches(batch: int, mesh: Mesh, wanted: int = 0) -> int:
    """The largest number of pieces that a batch of rows can have on `mesh`, up to `wanted`."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = batch // ways if batch % ways == 0 else batch
    most = wanted or A_STAGE * mesh.shape["pipeline"]
    return max(m for m in range(1, min(rows, most) + 1) if rows % m == 0)


def describe(batch: int, mesh: Mesh, wanted: int) -> list[str]:
    """For the log; nothing without a pipeline."""
    P = mesh.shape["pipeline"]
    if P == 1:
        return []
    M = microbatches(batch, mesh, wanted)
    bubble = (P - 1) / (M + P - 1)
    return [f"pipeline: {P} stages, {M} microbatches of {batch // M} sequences; idle {bubble:.1%} of the time (bubble)"]


def run(layer: Layer, params: Tree, own: tuple[Tree, ...], x_BTD: jax.Array, shared: Shared) -> jax.Array:
    """The layers' stack on the mesh in use -> [B, T, D]. `params` and `own` have the layers [L, ...] in front.

    Each stage, and each copy of it along `data`, is a program of its own, in which XLA splits what the other axes
    split; so the gradients of its parameters add up there, and over the copies once, after the last tick.
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
    """What one stage does with the rows of its copy."""
    stage = jax.lax.axis_index("pipeline")
    entering = jax.tree.map(partial(_split, M, "seq"), moving)
    still = jax.tree.map(partial(_split, M, None), still)
    entering = jax.tree.map(lambda a: jnp.concatenate([a, *[a[:1]] * (P - 1)]), entering)  # nobody reads what is last

    def tick(made: Tree, now: Tree) -> tuple[Tree, jax.Array]:
        new, at = now
        moving = jax.tree.map(lambda new, old: jnp.where(stage == 0, new, _hand_on(P, old)), new, made)
        moving = jax.tree.map(lambda a: meshes.constrain(a, "batch", "seq", "act_embed"), moving)  # and its gradient
        piece = jnp.clip(at - stage, 0, M - 1)
        here = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, piece, keepdims=False), still)
        here = here._replace(memory_BSD=moving[1], **whole)
        x = jax.lax.scan(lambda x, each: (layer(each[0], x, here, *each[1]), None), moving[0], layers)[0]
        return (x, moving[1]), x

    begin = jax.tree.map(lambda a: a[0], entering)  # real rows: nothing in a bubble may be NaN, not even times zero
    _, made = jax.lax.scan(tick, begin, (entering, jnp.arange(M + P - 1)))
    x_MbTD = jnp.where(stage == P - 1, made[P - 1 :], 0)
    x_MbTD = jax.lax.psum(x_MbTD, "pipeline")
    return x_MbTD.swapaxes(0, 1).reshape(-1, *x_MbTD.shape[2:])


def _split(M: int, along: str | None, a: jax.Array) -> jax.Array:
    """[B, ...] -> [M, b, ...]; `along` is the rule of the axis after the rows."""
    a = a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1)
    return meshes.constrain(a, *[None, "batch", along, None][: a.ndim])


def _hand_on(P: int, a: jax.Array) -> jax.Array:
    """To the next stage; the first, which does not read it, gets nothing."""
    return jax.lax.ppermute(a, "pipeline", [(i, i + 1) for i in range(P - 1)])


def spread(x_BTD: jax.Array) -> jax.Array:
    """Hands the rows of what leaves the pipeline to its stages, which share what comes after it (the output head)."""
    mesh = meshes.current()
    if stages() == 1 or mesh is None or len(x_BTD) % (mesh.size // mesh.shape["tensor"]):
        return x_BTD
    return meshes.constrain(x_BTD, "batch_out", "seq", "act_embed")
