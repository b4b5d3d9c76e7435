"""Convert a weight's type to a JSON record for the manifest, and rebuild a weight from the record and arrays.

The manifest is the JSON file that describes an artifact. A weight is a plain array or a weight node, an object that
stores one weight as several arrays (`llmctl.model.weights.base`). Every record contains "parts", which is {name:
[dtype, shape]} of the stored arrays. The record of a weight node also contains "node", the name of the class. Further
entries are the settings: the fields of the node that are not arrays.
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
        "packed": "llmctl.model.weights.packed:Packed",
        "learned_scale": "llmctl.model.weights.learned_scale:LearnedScale",
        "low_rank": "llmctl.model.weights.low_rank:LowRank",
        "scaled": "llmctl.model.weights.scaled:Scaled",
        "svd": "llmctl.model.weights.svd:Svd",
        "dora": "llmctl.model.weights.dora:Dora",
    },
)
"""Map from names in manifests to the classes of weights that consist of several arrays, such as `Quantized`."""


def parts(w: Any) -> dict[str, Any]:
    """Return the stored arrays of a weight by name. The name of a plain array is the empty string."""
    return as_node(w).parts()


def describe(w: Any) -> dict[str, Any]:
    """Return a JSON record of a weight's type, dtypes and shapes, from which `assemble` rebuilds the weight."""
    return {"parts": {k: [str(a.dtype), list(a.shape)] for k, a in parts(w).items()}, **typed(w)}


def typed(w: Any) -> dict[str, Any]:
    """Return the record of a weight without the entry "parts", which has the dtypes and shapes.

    For a plain array, the result is {}. For a weight node, the result has the name of the class and the settings.
    """
    return {} if is_plain(w) else {"node": w.kind, **w.settings()}


def assemble(record: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """Rebuild a weight from its record (see `describe`) and its stored arrays (see `parts`).

    The arrays may be abstract.

    Raises:
        RequestError: If no installed package provides the recorded class.
    """
    record = _current(record)
    return KINDS[record["node"]].restore(record, arrays) if "node" in record else arrays[""]


def _current(record: dict[str, Any]) -> dict[str, Any]:
    """Convert the record of a weight to the current format. Records of older artifacts lack the key "node"."""
    if "node" in record:
        return record
    base = {"node": "quantized", "activations": record["activations"]} if record.get("quantized") else {}
    if "low_rank_scale" in record:
        return {"node": "low_rank", "scale": record["low_rank_scale"], "base": base}
    return base
