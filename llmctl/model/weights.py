"""Weights: the leaves of the parameter tree, and the only place where a weight meets an activation.

A Weight is a plain array, a Quantized array or a LowRank update around one of them. A node's first leaf always has the
logical shape of the weight, which is what Flax checks against the config. Stacked layers keep their leading axis L in
every leaf of a node, so that a scan over layers slices nodes like arrays.

Shapes: N tokens (any number of leading axes), I inputs, O outputs, R rank, V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import qwix

from llmctl.model import quantized_matmul


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["activations"])
@dataclass(frozen=True)
class Quantized:
    """Integers with scales, symmetric; `activations="int8"` also quantizes what they multiply, per token (W8A8)."""

    array: qwix.QArray
    activations: str = field(default="")

    shape = property(lambda self: self.array.qvalue.shape)
    ndim = property(lambda self: self.array.qvalue.ndim)
    dtype = property(lambda self: self.array.scale.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclass(frozen=True)
class LowRank:
    """base + scale * a @ b (LoRA, arXiv:2106.09685); a [..., I, R], b [..., R, O]."""

    base: jax.Array | Quantized
    a: jax.Array
    b: jax.Array
    scale: float

    shape = property(lambda self: self.base.shape)
    ndim = property(lambda self: self.base.ndim)
    dtype = property(lambda self: self.base.dtype)


Weight = jax.Array | Quantized | LowRank


def is_weight(x: Any) -> bool:
    """True where a tree of weights has a leaf; use as `is_leaf`."""
    return not isinstance(x, dict)


def dense(w: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """The weight as a plain array of its logical shape."""
    if isinstance(w, Quantized):
        return qwix.dequantize(w.array).astype(dtype)
    if isinstance(w, LowRank):
        delta = w.scale * jnp.matmul(w.a.astype(jnp.float32), w.b.astype(jnp.float32))
        return (dense(w.base) + delta).astype(dtype)
    return w.astype(dtype)


def matmul(x: jax.Array, w: Weight, dtype: Any, kind: str = "", fold: bool = True) -> jax.Array:
    """x [..., I] times w [I, O] in `dtype` -> [..., O].

    A plain array may be multiplied in 8 bits while it is trained: `kind` is a name of `training_matmul.TYPES`.
    `fold`: leading axes become one, with which XLA's CPU backend runs much faster (see recipes/bench). Where devices
    split more than the first of them, no sharding of the one axis says the same, and XLA would gather.
    """
    x = x.astype(dtype)
    if isinstance(w, LowRank):
        low = matmul(matmul(x, w.a, dtype, fold=fold), w.b, dtype, fold=fold)
        return matmul(x, w.base, dtype, fold=fold) + jnp.asarray(w.scale, dtype) * low
    x_NI = x.reshape(-1, x.shape[-1]) if fold else x
    if isinstance(w, Quantized):
        y_NO = _quantized_matmul(x_NI, w, dtype)
    elif kind:
        y_NO = cast(jax.Array, quantized_matmul.matmul(x_NI, w.astype(dtype), kind))
    else:
        y_NO = jnp.matmul(x_NI, w.astype(dtype))
    return y_NO.reshape(*x.shape[:-1], w.shape[-1])


def _quantized_matmul(x: jax.Array, w: Quantized, dtype: Any) -> jax.Array:
    if w.activations:
        # One scale a token; grouped weights need the same groups on the activation.
        groups, last = w.array.scale.shape[0], x.ndim - 1
        tiles = {last: x.shape[last] // groups} if groups > 1 else None
        x_q = qwix.quantize(x, w.activations, channelwise_axes=list(range(last)), tiled_axes=tiles)
        return qwix.dot_general(x_q, w.array, (((last,), (0,)), ((), ()))).astype(dtype)
    if w.array.scale.shape[0] == 1:  # per output channel: scaling the product is cheaper than scaling the weight
        return jnp.matmul(x, w.array.qvalue.astype(dtype)) * w.array.scale.astype(dtype)
    return jnp.matmul(x, dense(w, dtype))


def transpose_matmul(x: jax.Array, table: Weight, dtype: Any) -> jax.Array:
    """x [..., D] times the transpose of table [V, D] in `dtype` -> [..., V] (tied output projection)."""
    x_ND = x.astype(dtype).reshape(-1, x.shape[-1])
    y_NV = jax.lax.dot_general(x_ND, dense(table, dtype), (((1,), (1,)), ((), ())))
    return y_NV.reshape(*x.shape[:-1], table.shape[0])


def take(table: Weight, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of table [V, D] at ids [...] -> [..., D]; only the rows taken are dequantized."""
    if isinstance(table, Quantized):
        q_ND = jnp.take(table.array.qvalue, ids, axis=0)
        scale = table.array.scale
        scale_NG = (
            jnp.take(scale, ids, axis=0)
            if scale.shape[0] > 1
            else jnp.broadcast_to(scale[0], (*ids.shape, scale.shape[1]))
        )
        return (
            q_ND.astype(dtype) * jnp.repeat(scale_NG.astype(dtype), q_ND.shape[-1] // scale_NG.shape[-1], axis=-1)
        ).astype(dtype)
    if isinstance(table, LowRank):
        rows = take(table.base, ids, dtype)
        return rows + table.scale * jnp.matmul(take(table.a, ids, dtype), table.b.astype(dtype))
    return jnp.take(table, ids, axis=0).astype(dtype)


# --- the tree as plain dictionaries: names, storage, node types -------------------------------------------------------


def flatten(params: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> {"decoder/blocks/attn/q/kernel": Weight}, sorted by path."""
    flat: dict[str, Any] = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                visit(child, f"{path}/{key}" if path else key)
        else:
            flat[path] = node

    visit(params, "")
    return dict(sorted(flat.items()))


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def parts(w: Any) -> dict[str, Any]:
    """The arrays a weight is stored as, by name; a plain array is its own only part, with an empty name."""
    if isinstance(w, Quantized):
        return {"qvalue": w.array.qvalue, "scale": w.array.scale}
    if isinstance(w, LowRank):
        return {**{f"base.{k}".rstrip("."): v for k, v in parts(w.base).items()}, "a": w.a, "b": w.b}
    return {"": w}


def describe(w: Any) -> dict[str, Any]:
    """A JSON record of a weight's type, from which `assemble` rebuilds the node around its parts."""
    record: dict[str, Any] = {"parts": {k: [str(v.dtype), list(v.shape)] for k, v in parts(w).items()}}
    base = w.base if isinstance(w, LowRank) else w
    if isinstance(base, Quantized):
        record |= {"quantized": True, "activations": base.activations}
    if isinstance(w, LowRank):
        record["low_rank_scale"] = w.scale
    return record


def assemble(record: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """Inverse of (`describe`, `parts`); the arrays may be abstract."""
    low_rank = "low_rank_scale" in record
    prefix = "base." if low_rank else ""
    if record.get("quantized"):
        base: Any = Quantized(
            qwix.QArray(arrays[prefix + "qvalue"], arrays[prefix + "scale"], qtype=arrays[prefix + "qvalue"].dtype),
            record["activations"],
        )
    else:
        base = arrays["base" if low_rank else ""]
    return LowRank(base, arrays["a"], arrays["b"], record["low_rank_scale"]) if low_rank else base


def count(params: dict[str, Any]) -> int:
    """Parameters by logical shape; a low-rank pair adds its own."""
    total = 0
    for w in flatten(params).values():
        total += _size(w.shape)
        if isinstance(w, LowRank):
            total += _size(w.a.shape) + _size(w.b.shape)
    return total


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def merge_low_rank(params: dict[str, Any]) -> dict[str, Any]:
    """Every LowRank replaced by the dense sum, in the type of its base (float32 for a quantized one)."""

    def merged(w: Any) -> Any:
        return dense(w, w.base.dtype) if isinstance(w, LowRank) else w

    return cast(dict[str, Any], jax.tree.map(merged, params, is_leaf=is_weight))


# --- what is trained and what is not ------------------------------------------------------------------------------


def name_of(path: str, part: str) -> str:
    """The name of one array: the weight's path, and for a node its part."""
    return f"{path}:{part}" if part else path


def arrays(params: dict[str, Any]) -> dict[str, Any]:
    """Every array by name, a flat dictionary that optimizers and checkpoints understand."""
    return {name_of(path, part): a for path, w in flatten(params).items() for part, a in parts(w).items()}


def rebuild(template: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `arrays`: the nodes of `template` (a parameter tree, abstract or not) around other arrays."""
    flat = {}
    for path, w in flatten(template).items():
        flat[path] = assemble(describe(w), {part: named[name_of(path, part)] for part in parts(w)})
    return unflatten(flat)
