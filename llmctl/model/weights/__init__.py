"""Define the weights in a parameter tree, and all products of weights with activations.

A weight is a plain array or a weight node: an object that stores one weight as several arrays
(`llmctl.model.weights.base.Node`). Examples of nodes are a quantized matrix (integers and scales) and a matrix with a
LoRA adapter. Other packages can define nodes. The functions of this package accept both arrays and nodes:

    >>> import jax.numpy as jnp
    >>> w, x = jnp.ones((8, 4)), jnp.ones((2, 8))
    >>> pair = LowRank(w, jnp.ones((8, 1)), jnp.ones((1, 4)), scale=0.5)
    >>> matmul(x, w, jnp.float32)[0, 0].item(), matmul(x, pair, jnp.float32)[0, 0].item()
    (8.0, 12.0)
    >>> as_node(pair).has_adapter, as_node(w).has_adapter, is_plain(as_node(pair).merged())
    (True, False, True)

Only products of plain arrays use `fsdp_matmul`, `quantized_matmul` and `embedding_lookup`. Products without weights,
such as the products in attention, are not defined in this package.

`tree` has the functions for weights and parameter trees, and `names` parses the names of arrays. `base` defines nodes.
`matrices` finds the matrices to compress.
"""

from __future__ import annotations

from llmctl.model.weights.adapter import (
    Adapter,
    adapted,
    adapter_names,
    base_part,
    merge_adapters,
    merge_bias_adapters,
    without_adapters,
)
from llmctl.model.weights.base import Node, Product, node_type, setting
from llmctl.model.weights.dora import Dora
from llmctl.model.weights.learned_scale import LearnedScale
from llmctl.model.weights.low_rank import LowRank
from llmctl.model.weights.matrices import (
    Matrix,
    layer_matrices,
    layer_of,
    map_layer,
    matrices,
    per_layer,
    value_names,
    zero_names,
)
from llmctl.model.weights.names import (
    is_kernel,
    is_layer_matrix,
    is_stacked,
    join,
    kernel_of,
    matches,
    module_path,
    parse,
)
from llmctl.model.weights.nf4 import NormalFloat
from llmctl.model.weights.packed import Packed
from llmctl.model.weights.quantized import Quantized
from llmctl.model.weights.records import KINDS, assemble, describe, parts
from llmctl.model.weights.scaled import Scaled
from llmctl.model.weights.svd import Svd, orthogonality
from llmctl.model.weights.tree import (
    Weight,
    arrays,
    as_node,
    bias,
    count,
    dense,
    flatten,
    is_plain,
    is_weight,
    matmul,
    of_type,
    rebuild,
    take,
    transpose_matmul,
    unflatten,
    updated,
)

__all__ = [
    "KINDS",
    "Adapter",
    "Dora",
    "LearnedScale",
    "LowRank",
    "Matrix",
    "Node",
    "NormalFloat",
    "Packed",
    "Product",
    "Quantized",
    "Scaled",
    "Svd",
    "Weight",
    "adapted",
    "adapter_names",
    "arrays",
    "as_node",
    "assemble",
    "base_part",
    "bias",
    "count",
    "dense",
    "describe",
    "flatten",
    "is_kernel",
    "is_layer_matrix",
    "is_plain",
    "is_stacked",
    "is_weight",
    "join",
    "kernel_of",
    "layer_matrices",
    "layer_of",
    "map_layer",
    "matches",
    "matmul",
    "matrices",
    "merge_adapters",
    "merge_bias_adapters",
    "module_path",
    "node_type",
    "of_type",
    "orthogonality",
    "parse",
    "parts",
    "per_layer",
    "rebuild",
    "setting",
    "take",
    "transpose_matmul",
    "unflatten",
    "updated",
    "value_names",
    "without_adapters",
    "zero_names",
]
