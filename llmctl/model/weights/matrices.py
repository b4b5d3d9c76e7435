"""Find the matrices of a model: what pruning, quantization and adapters work on, layer by layer.

Norms, biases and position tables are no matrices. Matrices of layers are stacked [L, I, O]; `per_layer` alone takes
leading axes apart.
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
    """One matrix, with all its layers if it is stacked."""

    path: str
    """`decoder/blocks/attn/q/kernel`; relative to the layer for a matrix of one layer."""
    weight: Any
    """A plain array or a node, [..., I, O]; a token table is [V, D]."""
    place: Place
    """`block`, `head` or `embedding`; a tied table counts as an embedding."""
    stack: str
    """`encoder` or `decoder`; empty outside stacks and for a matrix of one layer."""
    module: str
    """Its owner within the layer, `attn/q`: the name of its inputs in calibration."""

    @property
    def node(self) -> Node:
        """The weight's methods."""
        return as_node(self.weight)

    @property
    def inputs(self) -> int:
        """Axis of the inputs: -2, or -1 for a token table, which is looked up by row."""
        return -1 if self.place == "embedding" else -2

    @property
    def name(self) -> str:
        """Last key of the module: `q`, `down`, `out`."""
        return self.module.rpartition("/")[2]


def matrices(params: Params, *places: Place) -> Iterator[Matrix]:
    """Yield the matrices of a model in `places` (all without any), sorted by path; weights may be abstract.

    >>> tree = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.ones((2, 8, 8)), "bias": jnp.ones((2, 8))}}}}}
    >>> [(m.stack, m.module, m.place, m.weight.shape) for m in matrices(tree)]
    [('decoder', 'attn/q', 'block', (2, 8, 8))]
    """
    for path, w in flatten(params).items():
        name = names.parse(path)
        if name.place and (not places or name.place in places):
            yield Matrix(path, w, name.place, name.stack, name.module)


def layer_matrices(layer: Params) -> Iterator[Matrix]:
    """Yield the matrices of one layer's tree ({"attn": {"q": {"kernel": [I, O], …}}}), sorted by path."""
    for path, w in flatten(layer).items():
        if names.is_kernel(path):
            yield Matrix(path, w, "block", "", names.parse(path).module)


def map_layer(layer: Params, change: Callable[[Matrix], Any]) -> Params:
    """Return one layer's tree with `change` of every matrix in its place."""
    return updated(layer, {m.path: change(m) for m in layer_matrices(layer)})


def per_layer(w: Any, change: Callable[[Any], Any]) -> Any:
    """Return `change` of each matrix [I, O] of a stacked weight, stacked again along all its leading axes."""
    if as_node(w).ndim == 2:
        return change(w)
    changed = [per_layer(layer_of(w, i), change) for i in range(w.shape[0])]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *changed)


def layer_of(tree: Any, index: int) -> Any:
    """Return one layer's slice of a stacked weight, or of a tree of them."""
    return jax.tree.map(lambda a: a[index], tree)


def zero_names(params: Params) -> frozenset[str]:
    """Return the names of the arrays whose zeros are those of pruned matrices, if the model was pruned.

    They are floating-point arrays of layers' matrices. Adapters start at zero and were not pruned.
    """
    found = ((m.path, m.node, m.node.values_part) for m in matrices(params, "block"))
    return frozenset(names.join(path, part) for path, node, part in found if part is not None and not node.is_integer)
