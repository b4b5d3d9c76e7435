"""Define adapters: weights that consist of a frozen base weight and small trained arrays.

The trained arrays can be merged into the base weight after training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import jax
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.model.weights.base import Node
from llmctl.model.weights.names import bias_of, join
from llmctl.model.weights.records import assemble, typed
from llmctl.model.weights.tree import Params, as_node, flatten, is_weight, updated


@dataclass(frozen=True)
class Adapter(Node):
    """Define the base class of adapters, which store a frozen weight (the base) together with small trained arrays.

    A subclass adds the small arrays as fields, and lists the trained arrays in `adapter_parts`. The subclass also
    defines `dense`, which returns the weight with the adapter applied.
    """

    adapter_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that are trained; all others are frozen."""

    base: Any
    """Frozen weight to which the adapter is applied: a plain array, or a weight node such as a quantized weight."""

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)
    is_integer = property(lambda self: as_node(self.base).is_integer)
    has_adapter = property(lambda self: True)

    @property
    def values_part(self) -> str | None:
        """Return the name of an array of the base that has the same zeros as the dense base.

        For a quantized base, the result is the name of the integers. The result is None if no array has this property.
        """
        part = as_node(self.base).values_part
        return None if part is None else _base_part(part)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return the weight with its adapter merged, as a plain array.

        If the base is quantized and decoding multiplies by its integers directly, return this object unchanged.
        """
        base = as_node(self.base)
        return self if base.is_integer and base.for_decoding(on_cpu) is base else self.dense()

    def parts(self) -> dict[str, Any]:
        """Return the arrays of the base and the adapter by name.

        The names of the base's arrays begin with `base.`; if the base is a plain array, its name is `base`.
        """
        inner = {_base_part(k): a for k, a in as_node(self.base).parts().items()}
        return inner | {k: a for k, a in super().parts().items() if k != "base"}

    def settings(self) -> dict[str, Any]:
        """Return the fields that are not arrays as JSON data, with the base's fields under the key `base`."""
        return {**super().settings(), "base": typed(self.base)}

    @classmethod
    def restore(cls, settings: dict[str, Any], parts: dict[str, Any]) -> Self:
        """Build an adapter from the results of `settings` and `parts`."""
        inner = {base_part(k): a for k, a in parts.items() if _is_base(k)}
        own = {k: a for k, a in parts.items() if not _is_base(k)}
        return super().restore(settings, {"base": assemble(settings["base"], inner), **own})

    def count(self) -> int:
        """Return the number of parameters of the base and the adapter."""
        return as_node(self.base).count() + sum(math.prod(self.parts()[name].shape) for name in self.adapter_parts)

    def bare(self) -> Any:
        """Return the frozen base weight, without the adapter."""
        return self.base

    def with_base(self, base: Any) -> Self:
        """Return the same adapter applied to another weight of the same shape, `base`."""
        return replace(self, base=base)

    def merged(self) -> jax.Array:
        """Return the base with the adapter applied, as a dense array in the dtype of the base.

        If the base is quantized, the result has the dtype of the base's scales.
        """
        return self.dense(self.base.dtype)

    def misfit(self) -> str:
        """Return the name of an array of the base whose shape does not fit the weight; "" if all arrays fit."""
        found = as_node(self.base).misfit()
        return _base_part(found) if found else ""

    def without_activations(self) -> Self:
        """Return the same weight without quantization of activations (the inputs of the base)."""
        return replace(self, base=as_node(self.base).without_activations())

    def masked(self, mask: jax.Array) -> Any:
        """Raise an error: adapters must be merged before pruning, because adapters make pruned weights nonzero again.

        Raises:
            RequestError: Always.
        """
        raise RequestError("a low-rank update would fill the zeros again; merge it into its base before pruning")

    def select(self, index_LN: np.ndarray, axis: int) -> Any:
        """Raise an error: adapters must be merged before inputs or outputs of a weight are removed.

        Raises:
            RequestError: Always.
        """
        raise RequestError("has a low-rank update; merge it into its base before pruning")


def _base_part(part: str) -> str:
    return f"base.{part}" if part else "base"


def base_part(part: str) -> str:
    """Remove the prefix "base." from the name of an array of the base.

    Arrays of the adapter, such as "a", keep their names.

    >>> base_part("base"), base_part("base.scale"), base_part("a")
    ('', 'scale', 'a')
    """
    return "" if part == "base" else part.removeprefix("base.")


def _is_base(part: str) -> bool:
    return part == "base" or part.startswith("base.")


def adapted(params: Params) -> dict[str, Any]:
    """Return {path: weight} for all weights in the tree that have an adapter."""
    return {path: w for path, w in flatten(params).items() if as_node(w).has_adapter}


def adapter_names(params: Params) -> frozenset[str]:
    """Return the names of all arrays that adapter methods train."""
    return frozenset(join(path, part) for path, w in flatten(params).items() for part in as_node(w).adapter_parts)


def merge_adapters(params: Params) -> Params:
    """Return the parameter tree with every adapter merged into its frozen base weight.

    A merged weight is a plain array in the dtype of the base. If the base is quantized, the merged weight has the dtype
    of the base's scales. If an adapter also scales the bias of the layer, the bias is multiplied by the adapter's
    factor.
    """
    settled = merge_bias_adapters(params)
    return cast(Params, jax.tree.map(lambda w: as_node(w).merged(), settled, is_leaf=is_weight))


def merge_bias_adapters(params: Params) -> Params:
    """Merge the adapters that also scale the bias of a layer, and return the parameter tree.

    Each stored bias is then multiplied by the adapter's factor. Other adapters are not changed.
    """
    flat = flatten(params)
    changes: dict[str, Any] = {}
    for path, w in adapted(params).items():
        if w.scales_bias:
            changes[path] = w.merged()
            bias = bias_of(path)
            if bias in flat:
                changes[bias] = w.bias(flat[bias], flat[bias].dtype)
    return updated(params, changes) if changes else params


def without_adapters(params: Params) -> Params:
    """Return the parameter tree with every adapter replaced by its frozen base weight."""
    return cast(Params, jax.tree.map(lambda w: as_node(w).bare(), params, is_leaf=is_weight))
