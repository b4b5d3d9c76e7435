"""Multiply weights, and process parameter trees, which are nested dictionaries of weights.

A weight is a plain array, or a weight node that stores one weight as several arrays (`llmctl.model.weights.base`). All
functions accept plain arrays and weight nodes. The model uses the nested tree. Optimizers, checkpoints and artifacts
use flat dictionaries of arrays by name (`llmctl.model.weights.names`).

Shapes: N tokens (any number of leading axes), I inputs, O outputs, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.distributed import mesh as meshes
from llmctl.model import embedding_lookup, fsdp_matmul, quantized_matmul
from llmctl.model.weights.base import Node, Product, take_along
from llmctl.model.weights.names import join

Params = dict[str, Any]
Weight = jax.Array | Node
N = TypeVar("N", bound=Node)


@dataclass(frozen=True)
class Plain(Node):
    """Wrap a plain or abstract array, to give it the methods of `Node`. Parameter trees contain the array itself."""

    kind: ClassVar[str] = ""

    array: Any

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    values_part = property(lambda self: "")

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the array in `dtype`."""
        return self.array.astype(dtype)

    def matmul(self, x: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x @ array, [..., O], in `dtype`.

        Under FSDP, the array is gathered once per pass. The product is computed in 8 bits if `options.kind` is set.
        """
        if options.axes and not options.kind and meshes.size() > 1 and fsdp_matmul.splits(options.axes):
            return cast(jax.Array, fsdp_matmul.matmul(x, self.array, options.axes, dtype))
        x = x.astype(dtype)
        x_NI = x.reshape(-1, x.shape[-1]) if options.fold else x
        w_IO = self.array.astype(dtype)
        y_NO = quantized_matmul.matmul(x_NI, w_IO, options.kind) if options.kind else jnp.matmul(x_NI, w_IO)
        return cast(jax.Array, y_NO).reshape(*x.shape[:-1], self.shape[-1])

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of the table, [..., D], in `dtype`.

        If devices shard the table, they exchange embeddings or gather the table, whichever sends fewer bytes.
        """
        if axes and meshes.size() > 1:
            return embedding_lookup.take(self.array, ids, axes[0], dtype)
        return jnp.take(self.array, ids, axis=0).astype(dtype)

    def parts(self) -> dict[str, Any]:
        """Return {"": array}: a plain array has no further name within its weight."""
        return {"": self.array}

    def masked(self, mask: jax.Array) -> jax.Array:
        """Return the array with zeros at the False entries of the mask."""
        return jnp.where(mask, self.array, jnp.zeros((), self.array.dtype))

    def select(self, index_LN: np.ndarray, axis: int) -> jax.Array:
        """Return an array [layers, inputs, outputs] with only the selected inputs or outputs of each layer."""
        return take_along(self.array, index_LN, axis, self.shape[axis])

    def bare(self) -> Any:
        """Return the array unchanged, because it has no adapter."""
        return self.array

    def merged(self) -> Any:
        """Return the array unchanged, because it has no adapter to merge."""
        return self.array

    def without_activations(self) -> Any:
        """Return the array unchanged, because its inputs are not quantized."""
        return self.array

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return the array unchanged, because decoding reads it directly."""
        return self.array


def as_node(w: Any) -> Node:
    """Return a weight as an object with the methods of `Node`.

    A weight node is returned unchanged. A plain array is wrapped in `Plain`.
    """
    return w if isinstance(w, Node) else Plain(w)


def is_plain(w: Any) -> bool:
    """Return True if the weight is a plain array."""
    return not isinstance(w, Node)


# --- products ---------------------------------------------------------------------------------------------------------


def dense(w: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """Return the weight as one dense array. For example, a quantized weight is dequantized."""
    return as_node(w).dense(dtype)


def matmul(
    x: jax.Array,
    w: Weight,
    dtype: Any,
    kind: str = "",
    fold: bool = True,
    axes: tuple[str, str] | None = None,
) -> jax.Array:
    """Return x @ w, [..., O], in `dtype`. `Product` describes the other arguments."""
    return as_node(w).matmul(x, dtype, Product(fold, kind, axes))


def bias(w: Weight, b: jax.Array, dtype: Any) -> jax.Array:
    """Return the bias of the dense layer with the matrix `w`, in `dtype`.

    The result is the stored bias `b`. If an adapter of `w` scales the bias, `b` is multiplied by the adapter's factor.
    """
    return as_node(w).bias(b, dtype)


def transpose_matmul(x: jax.Array, table: Weight, dtype: Any) -> jax.Array:
    """Return x @ transpose(table), [..., V], in `dtype`: the product of a tied output projection."""
    return as_node(table).transpose_matmul(x, dtype)


def take(table: Weight, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
    """Return the rows `ids` of the table, [..., D], in `dtype`.

    `axes` are the names of the table's axes in the sharding rules.
    """
    return as_node(table).take(ids, dtype, axes)


# --- names ------------------------------------------------------------------------------------------------------------


def is_weight(x: Any) -> bool:
    """Return True if `x` is a weight, and False if it is a dictionary of weights.

    With `jax.tree.map(f, params, is_leaf=is_weight)`, the function f gets complete weights. Without `is_leaf`, f would
    get each array of a quantized weight separately.
    """
    return not isinstance(x, dict)


def flatten(params: Params) -> dict[str, Any]:
    """Return the weights of nested dictionaries by path ("decoder/blocks/attn/q/kernel"), sorted by path."""
    flat: dict[str, Any] = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                visit(child, f"{path}/{key}" if path else key)
        else:
            flat[path] = node

    visit(params, "")
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return nested dictionaries of the weights; the inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def updated(params: Params, changes: Mapping[str, Any]) -> Params:
    """Return the tree with some weights replaced: `changes` maps their paths to the new weights."""
    return unflatten({**flatten(params), **changes})


def arrays(params: Params) -> dict[str, Any]:
    """Return all arrays by name, as a flat dictionary for optimizers and checkpoints."""
    return {join(path, part): a for path, w in flatten(params).items() for part, a in as_node(w).parts().items()}


def rebuild(template: Params, named: Mapping[str, Any]) -> Params:
    """Return the parameter tree `template` with all arrays replaced by the arrays in `named`; the inverse of `arrays`.

    The arrays in `template` may be abstract.
    """

    def restored(path: str, node: Node) -> Node:
        return node.restore(node.settings(), {part: named[join(path, part)] for part in node.parts()})

    return unflatten({path: named[path] if is_plain(w) else restored(path, w) for path, w in flatten(template).items()})


def count(params: Params) -> int:
    """Return the number of parameters: the elements of all weights as plain arrays, plus the parameters of adapters."""
    return sum(as_node(w).count() for w in flatten(params).values())


def of_type(params: Params, kind: type[N]) -> dict[str, N]:
    """Return {path: weight} for all weights that are objects of the class `kind`, such as `Quantized`."""
    return {path: w for path, w in flatten(params).items() if isinstance(w, kind)}
