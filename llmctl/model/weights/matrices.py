"""Find the matrices of a model that pruning, quantization and adapters process.

Norms, biases and position tables do not count as matrices. Layers are stacked: for example, the query matrices of all L
decoder layers are one array [L, I, O].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.model.weights import names
from llmctl.model.weights.base import Node
from llmctl.model.weights.names import Place
from llmctl.model.weights.tree import Params, as_node, flatten, updated


@dataclass(frozen=True)
class Matrix:
    """Describe one matrix of a model, or the matrices of the same name in all layers, stacked into one array."""

    path: str
    """Path of the weight, such as `decoder/blocks/attn/q/kernel`. For the matrices that `layer_matrices` yields, the
    path is relative to the layer."""
    weight: Any
    """The weight [..., I, O], or the token embedding table [V, D]; a plain array, or a weight node (`weights.base`)."""
    place: Place
    """Part of the model that contains the matrix: `block` (a layer), `head` (an output head) or `embedding` (the token
    embedding table).

    If the token embedding table is also the output projection, the place is `embedding`.
    """
    stack: str
    """Stack whose layers contain the matrix, `encoder` or `decoder`. Empty if the matrix is not in a layer, or if
    `layer_matrices` yields it."""
    module: str
    """Path of the module within the layer, such as `attn/q`. Calibration names the inputs of the matrix by this
    path."""

    @property
    def node(self) -> Node:
        """Return the weight as an object with the methods of `Node`. A plain array is wrapped in `Plain`."""
        return as_node(self.weight)

    @property
    def inputs(self) -> int:
        """Return the index of the axis of inputs: -2, or -1 for a token embedding table [V, D]."""
        return -1 if self.place == "embedding" else -2

    @property
    def name(self) -> str:
        """Return the last key of the module path, such as `q`, `down` or `out`."""
        return self.module.rpartition("/")[2]


def matrices(params: Params, *places: Place) -> Iterator[Matrix]:
    """Yield the matrices of a model, sorted by path.

    If `places` is given, yield only matrices at these locations: "block" (layers), "head" (output heads), "embedding".

    >>> tree = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.ones((2, 8, 8)), "bias": jnp.ones((2, 8))}}}}}
    >>> [(m.stack, m.module, m.place, m.weight.shape) for m in matrices(tree)]
    [('decoder', 'attn/q', 'block', (2, 8, 8))]
    """
    for path, w in flatten(params).items():
        name = names.parse(path)
        if name.place and (not places or name.place in places):
            yield Matrix(path, w, name.place, name.stack, name.module)


def layer_matrices(layer: Params) -> Iterator[Matrix]:
    """Yield the matrices of one layer's parameters ({"attn": {"q": {"kernel": [I, O], …}}}), sorted by path."""
    for path, w in flatten(layer).items():
        if names.is_kernel(path):
            yield Matrix(path, w, "block", "", names.parse(path).module)


def map_layer(layer: Params, change: Callable[[Matrix], Any]) -> Params:
    """Return one layer's parameters with every matrix replaced by `change(matrix)`."""
    return updated(layer, {m.path: change(m) for m in layer_matrices(layer)})


def per_layer(w: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every matrix [I, O] of a stacked weight [..., I, O], and stack the results."""
    if as_node(w).ndim == 2:
        return change(w)
    changed = [per_layer(layer_of(w, i), change) for i in range(w.shape[0])]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *changed)


def layer_of(tree: Any, index: int) -> Any:
    """Return one layer of a weight that is stacked over layers, or of every such weight in a tree."""
    return jax.tree.map(lambda a: a[index], tree)


def value_names(params: Params) -> frozenset[str]:
    """Return the names of the arrays that store the elements of the layers' matrices.

    For a quantized matrix, this is the name of the array of integers. The names of scales and of adapter arrays are not
    returned.
    """
    found = ((m.path, m.node.values_part) for m in matrices(params, "block"))
    return frozenset(names.join(path, part) for path, part in found if part is not None)


def zero_names(params: Params) -> frozenset[str]:
    """Return the names of the arrays in which pruning sets elements to zero.

    These names belong to the floating-point arrays of the matrices in layers. Adapter arrays are excluded, because
    their zeros come from initialization and not from pruning.
    """
    found = ((m.path, m.node, m.node.values_part) for m in matrices(params, "block"))
    return frozenset(names.join(path, part) for path, node, part in found if part is not None and not node.is_integer)
