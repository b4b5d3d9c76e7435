"""Record a weight's type in the manifest, and rebuild the weight from the record and its arrays.

A record is {"parts": {name: [dtype, shape]}}; a node adds "node", its name in the registry, and its settings.
"""

from __future__ import annotations

from typing import Any

from llmctl.config.registry import Registry
from llmctl.model.weights.base import Node
from llmctl.model.weights.tree import as_node, is_plain

KINDS: Registry[type[Node]] = Registry(
    "weight",
    {
        "quantized": "llmctl.model.weights.quantized:Quantized",
        "low_rank": "llmctl.model.weights.low_rank:LowRank",
        "scaled": "llmctl.model.weights.scaled:Scaled",
        "svd": "llmctl.model.weights.svd:Svd",
        "dora": "llmctl.model.weights.dora:Dora",
    },
)
"""Weight nodes by the name that manifests record."""


def parts(w: Any) -> dict[str, Any]:
    """Return the arrays a weight is stored as, by name; a plain array is its own only part, with an empty name."""
    return as_node(w).parts()


def describe(w: Any) -> dict[str, Any]:
    """Return a JSON record of a weight's type, from which `assemble` rebuilds the node around its parts."""
    return {"parts": {k: [str(a.dtype), list(a.shape)] for k, a in parts(w).items()}, **typed(w)}


def typed(w: Any) -> dict[str, Any]:
    """Return the record of a weight without its parts; empty for a plain array."""
    return {} if is_plain(w) else {"node": w.kind, **w.settings()}


def assemble(record: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """Return the weight of a record around its parts: the inverse of (`describe`, `parts`). Arrays may be abstract.

    Raises:
      RequestError: the record names a node that no installed package provides.
    """
    record = _current(record)
    return KINDS[record["node"]].restore(record, arrays) if "node" in record else arrays[""]


def _current(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of an artifact that was written before nodes had names, in today's form."""
    if "node" in record:
        return record
    base = {"node": "quantized", "activations": record["activations"]} if record.get("quantized") else {}
    if "low_rank_scale" in record:
        return {"node": "low_rank", "scale": record["low_rank_scale"], "base": base}
    return base
