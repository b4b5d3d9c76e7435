"""Name the weights of a parameter tree, and the arrays they are stored as.

Optimizers, checkpoints and artifacts work on flat dictionaries by name (`llmctl.model.weights.names`); the model works
on the tree with its nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax

from llmctl.model.weights.base import Node
from llmctl.model.weights.names import join
from llmctl.model.weights.plain import as_node
from llmctl.model.weights.records import assemble, describe, parts

Params = dict[str, Any]
N = TypeVar("N", bound=Node)


def is_weight(x: Any) -> bool:
    """True for a leaf of a tree of weights, nodes included; use as `is_leaf`."""
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
    return {join(path, part): a for path, w in flatten(params).items() for part, a in parts(w).items()}


def rebuild(template: Params, named: Mapping[str, Any]) -> Params:
    """Return the nodes of `template` (a parameter tree, abstract or not) around other arrays: inverse of `arrays`."""
    flat = {}
    for path, w in flatten(template).items():
        flat[path] = assemble(describe(w), {part: named[join(path, part)] for part in parts(w)})
    return unflatten(flat)


def count(params: Params) -> int:
    """Return the number of parameters by logical shape; an adapter adds its own."""
    return sum(as_node(w).count() for w in flatten(params).values())


def of_type(params: Params, kind: type[N]) -> dict[str, N]:
    """Return the nodes of one class by path, for formats that hold nothing else (PEFT's LoRA)."""
    return {path: w for path, w in flatten(params).items() if isinstance(w, kind)}


def adapted(params: Params) -> dict[str, Any]:
    """Return the weights with an adapter that is not merged, by path."""
    return {path: w for path, w in flatten(params).items() if as_node(w).has_adapter}


def adapter_names(params: Params) -> frozenset[str]:
    """Return the names of the arrays that adapter methods train."""
    return frozenset(join(path, part) for path, w in flatten(params).items() for part in as_node(w).adapter_parts)


def merge_adapters(params: Params) -> Params:
    """Return the tree with every adapter added into its base, in the base's type (float32 for a quantized one)."""
    return cast(Params, jax.tree.map(lambda w: as_node(w).merged(), params, is_leaf=is_weight))


def without_adapters(params: Params) -> Params:
    """Return the tree with the bases alone."""
    return cast(Params, jax.tree.map(lambda w: as_node(w).bare(), params, is_leaf=is_weight))
