"""The parameter tree: nested dictionaries of weights, with functions that take a plain array or a node alike.

The model works on the tree. Optimizers, checkpoints and artifacts work on flat dictionaries of arrays by name
(`llmctl.model.weights.names`). A training step of a model with plain arrays enters no other module of this package.

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
    """A view of an array (or its abstract shape); parameter trees hold the array itself."""

    kind: ClassVar[str] = ""

    array: Any

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    values_part = property(lambda self: "")

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """See Node."""
        return self.array.astype(dtype)

    def matmul(self, x: jax.Array, dtype: Any, how: Product) -> jax.Array:
        """See Node.

        Under FSDP, the array is gathered once per pass. If training sets a type of 8-bit product, it is used.
        """
        if how.axes and not how.kind and meshes.size() > 1 and fsdp_matmul.splits(how.axes):
            return cast(jax.Array, fsdp_matmul.matmul(x, self.array, how.axes, dtype))
        x = x.astype(dtype)
        x_NI = x.reshape(-1, x.shape[-1]) if how.fold else x
        w_IO = self.array.astype(dtype)
        y_NO = quantized_matmul.matmul(x_NI, w_IO, how.kind) if how.kind else jnp.matmul(x_NI, w_IO)
        return cast(jax.Array, y_NO).reshape(*x.shape[:-1], self.shape[-1])

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """See Node. Devices that share the table exchange embeddings instead of gathering it, if that sends less."""
        if axes and meshes.size() > 1:
            return embedding_lookup.take(self.array, ids, axes[0], dtype)
        return jnp.take(self.array, ids, axis=0).astype(dtype)

    def parts(self) -> dict[str, Any]:
        """See Node; the array is its own only part, without a name."""
        return {"": self.array}

    def masked(self, mask: jax.Array) -> jax.Array:
        """See Node."""
        return jnp.where(mask, self.array, jnp.zeros((), self.array.dtype))

    def select(self, index_LN: np.ndarray, axis: int) -> jax.Array:
        """See Node."""
        return take_along(self.array, index_LN, axis, self.shape[axis])

    def bare(self) -> Any:
        """See Node."""
        return self.array

    def merged(self) -> Any:
        """See Node."""
        return self.array

    def without_activations(self) -> Any:
        """See Node."""
        return self.array

    def for_decoding(self, on_cpu: bool) -> Any:
        """See Node."""
        return self.array


def as_node(w: Any) -> Node:
    """Return the weight's methods: a node itself, a plain array in a `Plain`."""
    return w if isinstance(w, Node) else Plain(w)


def is_plain(w: Any) -> bool:
    """Return True for a weight that is one array."""
    return not isinstance(w, Node)


# --- products ---------------------------------------------------------------------------------------------------------


def dense(w: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """Return the weight as a plain array of its logical shape."""
    return as_node(w).dense(dtype)


def matmul(
    x: jax.Array,
    w: Weight,
    dtype: Any,
    kind: str = "",
    fold: bool = True,
    axes: tuple[str, str] | None = None,
) -> jax.Array:
    """Return x [..., I] times w [I, O] in `dtype` -> [..., O]; the options are those of `Product`."""
    return as_node(w).matmul(x, dtype, Product(fold, kind, axes))


def bias(w: Weight, b: jax.Array, dtype: Any) -> jax.Array:
    """Return the bias of the layer whose matrix is `w`, in `dtype`; `b` is the stored bias."""
    return as_node(w).bias(b, dtype)


def transpose_matmul(x: jax.Array, table: Weight, dtype: Any) -> jax.Array:
    """Return x [..., D] times the transpose of table [V, D] in `dtype` -> [..., V] (tied output projection)."""
    return as_node(table).transpose_matmul(x, dtype)


def take(table: Weight, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
    """Return rows of table [V, D] at ids [...] -> [..., D]; `axes` are the table's logical axes."""
    return as_node(table).take(ids, dtype, axes)


# --- names ------------------------------------------------------------------------------------------------------------


def is_weight(x: Any) -> bool:
    """Return True for a leaf of a tree of weights, nodes included; use as `is_leaf`."""
    return not isinstance(x, dict)


def flatten(params: Params) -> dict[str, Any]:
    """Return {"decoder/blocks/attn/q/kernel": weight}, sorted by path, of nested dictionaries."""
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
    """Return nested dictionaries: the inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def updated(params: Params, changes: Mapping[str, Any]) -> Params:
    """Return the tree with other weights at the paths of `changes`."""
    return unflatten({**flatten(params), **changes})


def arrays(params: Params) -> dict[str, Any]:
    """Return every array by name, a flat dictionary that optimizers and checkpoints understand."""
    return {join(path, part): a for path, w in flatten(params).items() for part, a in as_node(w).parts().items()}


def rebuild(template: Params, named: Mapping[str, Any]) -> Params:
    """Return `template` (a parameter tree, abstract or not) with other arrays in it: the inverse of `arrays`."""

    def restored(path: str, node: Node) -> Node:
        return node.restore(node.settings(), {part: named[join(path, part)] for part in node.parts()})

    return unflatten({path: named[path] if is_plain(w) else restored(path, w) for path, w in flatten(template).items()})


def count(params: Params) -> int:
    """Return the number of parameters by logical shape; an adapter adds its own."""
    return sum(as_node(w).count() for w in flatten(params).values())


def of_type(params: Params, kind: type[N]) -> dict[str, N]:
    """Return the nodes of one class by path, for formats that hold nothing else (PEFT's LoRA)."""
    return {path: w for path, w in flatten(params).items() if isinstance(w, kind)}
