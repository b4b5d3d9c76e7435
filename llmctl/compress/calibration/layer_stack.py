"""Replace the parameters of layers one by one while the other layers are still read.

All layers of an encoder or decoder are stacked: each parameter is one array [L, ...] for L layers. Weights that keep
their type are updated in place, so a second set of layers is never in memory. Weights that change their type (dense to
quantized) are collected in new stacked arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from llmctl.model.weights import flatten, unflatten

Layer = dict[str, Any]


class LayerStack:
    """Replace stacked parameters [L, ...] layer by layer, in any order.

    `put` replaces one layer, and `finish` returns the new stack. The first `put` donates the arrays that the
    constructor received.
    """

    def __init__(self, blocks: Layer) -> None:
        self._old, self._made = blocks, {}
        self._depth = jax.tree.leaves(blocks)[0].shape[0]
        self._changed: set[str] | None = None
        self._puts: list[Any] = []
        self._done: set[int] = set()

    def __getitem__(self, index: int) -> Layer:
        """Return the parameters of a layer that has not been replaced yet.

        For a replaced layer the result is undefined.
        """
        return jax.tree.map(lambda a: a[index], self._old)

    def put(self, index: int, layer: Layer) -> None:
        """Replace one layer.

        Raises:
          ValueError: If the names of the layer's parameters differ from the names in the stack. If the weights that
              change their type are not the same as in the first replaced layer.
        """
        new, old = flatten(layer), flatten(self._old)
        if new.keys() != old.keys():
            raise ValueError(f"a changed layer has other parameters: {sorted(new.keys() ^ old.keys())}")
        changed = {path for path in new if not _same_type(old[path], new[path])}
        if self._changed is None:
            self._changed = changed
            self._made = {path: _zeros_for(self._depth, new[path], old[path]) for path in changed}
            self._puts = [putter({p: w for p, w in old.items() if p not in changed}), putter(self._made)]
        if changed != self._changed:
            raise ValueError(f"layers change different weights: {sorted(changed ^ self._changed)}")
        at = jnp.int32(index)
        self._done.add(index)
        if len(changed) < len(new):
            kept = {p: w for p, w in old.items() if p not in changed}
            self._old = unflatten(old | self._puts[0](kept, {p: new[p] for p in kept}, at))
        if changed:
            self._made = self._puts[1](self._made, {p: new[p] for p in changed}, at)

    def finish(self) -> Layer:
        """Return the stacked parameters of all layers after the replacements.

        Raises:
          ValueError: If a weight changed its type, but not all layers were replaced.
        """
        if self._made and len(self._done) < self._depth:
            raise ValueError(f"{len(self._done)} of {self._depth} layers changed the type of {sorted(self._made)}")
        return unflatten(flatten(self._old) | self._made)


def putter(blocks: Layer) -> Any:
    """Return a compiled function that replaces one layer in stacked parameters [L, ...].

    Its arguments are the stacked parameters, the new layer, and the index of the layer. It returns the new stacked
    parameters. The old ones are donated.
    """

    def put(blocks: Layer, layer: Layer, index: jax.Array) -> Layer:
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, index, 0), blocks, layer)

    return jax.jit(put, donate_argnums=0, out_shardings=jax.tree.map(lambda a: a.sharding, blocks))


def shard_like(new: Layer, old: Layer) -> Layer:
    """Shard the arrays of a changed layer like the arrays of the unchanged layer, and return the changed layer.

    A dimension whose length has changed is replicated.
    """
    before = flatten(old)

    def one(path: str, w: Any) -> Any:
        return jax.tree.map(lambda part: jax.device_put(part, sharding(part.shape, before[path])), w)

    return unflatten({path: one(path, w) if path in before else w for path, w in flatten(new).items()})


def sharding(shape: tuple[int, ...], old: Any) -> Sharding:
    """Return the sharding of the unchanged weight `old`, adapted to the shape of a changed array.

    A dimension whose length has changed is replicated.
    """
    first = jax.tree.leaves(old)[0]
    if not isinstance(first.sharding, NamedSharding):
        return first.sharding
    names = [*first.sharding.spec, *[None] * (first.ndim - len(first.sharding.spec))]
    same = len(shape) == first.ndim
    axes = [
        name if same and n == first.shape[i] else None for i, (name, n) in enumerate(zip(names, shape, strict=False))
    ]
    return first.sharding.update(spec=PartitionSpec(*(axes if same else [None] * len(shape))))


def _same_type(stacked: Any, layer: Any) -> bool:
    if jax.tree.structure(stacked) != jax.tree.structure(layer):
        return False
    pairs = zip(jax.tree.leaves(stacked), jax.tree.leaves(layer), strict=True)
    return all((a.shape[1:], a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def _zeros_for(depth: int, layer: Any, old: Any) -> Any:
    """Return zeros in the shapes of one layer's weight, with a new first axis of length `depth`."""

    def one(a: jax.Array) -> jax.Array:
        shape = (depth, *a.shape)
        return jnp.zeros(shape, a.dtype, device=sharding(shape, old))

    return jax.tree.map(one, layer)
