"""Wrap a weight in an adapter: a few trained arrays beside a frozen base, added into it later or kept apart."""

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
    """Node around another weight. A kind of adapter adds its fields, names the trained ones, and defines `dense`."""

    adapter_parts: ClassVar[tuple[str, ...]] = ()
    """The fields that are trained; the others are frozen."""

    base: Any
    """A plain array or a node."""

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)
    is_integer = property(lambda self: as_node(self.base).is_integer)
    has_adapter = property(lambda self: True)

    @property
    def values_part(self) -> str | None:
        """See Node; that of the base."""
        part = as_node(self.base).values_part
        return None if part is None else _base_part(part)

    def for_decoding(self, on_cpu: bool) -> Any:
        """See Node: merged, unless the base stays as integers."""
        base = as_node(self.base)
        return self if base.is_integer and base.for_decoding(on_cpu) is base else self.dense()

    def parts(self) -> dict[str, Any]:
        """See Node; those of the base are `base.PART`, or `base` for a plain array."""
        inner = {_base_part(k): a for k, a in as_node(self.base).parts().items()}
        return inner | {k: a for k, a in super().parts().items() if k != "base"}

    def settings(self) -> dict[str, Any]:
        """See Node; `base` is the record of the base."""
        return {**super().settings(), "base": typed(self.base)}

    @classmethod
    def restore(cls, settings: dict[str, Any], parts: dict[str, Any]) -> Self:
        """See Node."""
        inner = {k.removeprefix("base").removeprefix("."): a for k, a in parts.items() if _is_base(k)}
        own = {k: a for k, a in parts.items() if not _is_base(k)}
        return super().restore(settings, {"base": assemble(settings["base"], inner), **own})

    def count(self) -> int:
        """See Node."""
        return as_node(self.base).count() + sum(math.prod(self.parts()[name].shape) for name in self.adapter_parts)

    def bare(self) -> Any:
        """See Node."""
        return self.base

    def merged(self) -> jax.Array:
        """See Node; float32 for a base of integers with float32 scales."""
        return self.dense(self.base.dtype)

    def without_activations(self) -> Self:
        """See Node; the base decides about activations."""
        return replace(self, base=as_node(self.base).without_activations())

    def masked(self, mask: jax.Array) -> Any:
        """See Node."""
        raise RequestError("a low-rank update would fill the zeros again; merge it into its base before pruning")

    def select(self, index_LN: np.ndarray, axis: int) -> Any:
        """See Node."""
        raise RequestError("has a low-rank update; merge it into its base before pruning")


def _base_part(part: str) -> str:
    return f"base.{part}" if part else "base"


def _is_base(part: str) -> bool:
    return part == "base" or part.startswith("base.")


def adapted(params: Params) -> dict[str, Any]:
    """Return the weights with an adapter that is not merged, by path."""
    return {path: w for path, w in flatten(params).items() if as_node(w).has_adapter}


def adapter_names(params: Params) -> frozenset[str]:
    """Return the names of the arrays that adapter methods train."""
    return frozenset(join(path, part) for path, w in flatten(params).items() for part in as_node(w).adapter_parts)


def merge_adapters(params: Params) -> Params:
    """Return the tree with every adapter merged into its base, in the base's type (float32 for a quantized one)."""
    settled = merge_bias_adapters(params)
    return cast(Params, jax.tree.map(lambda w: as_node(w).merged(), settled, is_leaf=is_weight))


def merge_bias_adapters(params: Params) -> Params:
    """Return the tree with those adapters merged that also change a bias, so that each weight stands for itself."""
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
    """Return the tree with the bases alone."""
    return cast(Params, jax.tree.map(lambda w: as_node(w).bare(), params, is_leaf=is_weight))
