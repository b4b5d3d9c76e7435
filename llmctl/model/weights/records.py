"""Convert the type of a weight to a JSON record for the manifest, and rebuild a weight from its record and arrays.

The record of a plain array is {"parts": {name: [dtype, shape]}}. For a weight node, it also contains "node", the name
of its class in the registry, and the settings of the node.
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
        "nf4": "llmctl.model.weights.nf4:NormalFloat",
        "low_rank": "llmctl.model.weights.low_rank:LowRank",
        "scaled": "llmctl.model.weights.scaled:Scaled",
        "svd": "llmctl.model.weights.svd:Svd",
        "dora": "llmctl.model.weights.dora:Dora",
    },
)
"""Classes of weight nodes, by their name in manifests."""


def parts(w: Any) -> dict[str, Any]:
    """Return the stored arrays of a weight by name. A plain array has one part with an empty name."""
    return as_node(w).parts()


def describe(w: Any) -> dict[str, Any]:
    """Return a JSON record of a weight's type, dtypes and shapes, from which `assemble` rebuilds the weight."""
    return {"parts": {k: [str(a.dtype), list(a.shape)] for k, a in parts(w).items()}, **typed(w)}


def typed(w: Any) -> dict[str, Any]:
    """Return the record of a weight without "parts": the name and settings of its node, or {} for a plain array."""
    return {} if is_plain(w) else {"node": w.kind, **w.settings()}


def assemble(record: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """Return the weight that a record of `describe` and the arrays of `parts` define.

    Arrays may be abstract.

    Raises:
        RequestError: If no installed package provides the recorded class.
    """
    record = _current(record)
    return KINDS[record["node"]].restore(record, arrays) if "node" in record else arrays[""]


def _current(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of an older artifact, in which nodes had no names, to the current format."""
    if "node" in record:
        return record
    base = {"node": "quantized", "activations": record["activations"]} if record.get("quantized") else {}
    if "low_rank_scale" in record:
        return {"node": "low_rank", "scale": record["low_rank_scale"], "base": base}
    return base
