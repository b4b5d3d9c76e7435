"""Read and write low-rank adapters of the token embedding table in PEFT's format.

In PEFT's format, the adapter of an embedding table has other tensor names than the adapter of a linear layer. PEFT
adapts modules, and llmctl adapts weights. If the table is also the output projection, PEFT's format therefore has two
adapters with the same values.

Shapes: V vocabulary, D model width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.convert import architectures, peft_lora
from llmctl.convert.lazy_tensors import Tensor
from llmctl.convert.name_map import TensorLayout
from llmctl.model import weights
from llmctl.model.config import ModelConfig

NAMES = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
"""Map from the tensor names of a linear layer's adapter to the tensor names of an embedding table's adapter."""


class Table(NamedTuple):
    """Locate the token embeddings in llmctl's parameter tree and in the Hugging Face format."""

    path: str
    """Path of the weight in llmctl's parameter tree."""
    module: str
    """Name of the module in the Hugging Face format."""
    output: str
    """Name of the output projection in the Hugging Face format, if the projection is tied to the embedding table;
    otherwise empty."""


def of(cfg: ModelConfig, tensor_layouts: Mapping[str, TensorLayout]) -> Table:
    """Return the Table of a model. `tensor_layouts` are the model's tensors in the Hugging Face format."""
    name, slot = next(
        (n, j.slots[0]) for n, j in tensor_layouts.items() if weights.parse(j.slots[0].path).place == "embedding"
    )
    output = architectures.of(cfg)[1].names.get("lm_head/kernel", "") if cfg.tied and cfg.head_kind.vocabulary else ""
    return Table(slot.path, name.removesuffix(".weight"), output.removesuffix(".weight"))


def read(
    table: Table, config: Mapping[str, Any], stored: Mapping[str, Tensor], prefix: str, shape: tuple[int, ...]
) -> tuple[peft_lora.Pair | None, set[str]]:
    """Return the adapter of the token embedding table [V, D], and the names of the adapter's tensors.

    If the table has no adapter, return None and an empty set.

    Raises:
        RequestError: If the tensors do not fit the table, or if adapters of tied modules differ.
    """
    names = [f"{table.module}.{name}" for name in NAMES.values()]
    if not any(prefix + name in stored for name in names):
        return None, set()
    if missing := [name for name in names if prefix + name not in stored]:
        raise RequestError(f"{table.module} has an adapter without {missing[0]}")
    a_RV, b_DR = (np.asarray(stored[prefix + name].read(), np.float32) for name in names)
    rank = a_RV.shape[0]
    if (a_RV.shape, b_DR.shape) != ((rank, shape[0]), (shape[1], rank)):
        raise RequestError(f"{names[0]} is {list(a_RV.shape)}, which does not fit the base's table {list(shape)}")
    scale, used = peft_lora.scale_of(config, table.module, rank), set(names)
    if table.output:
        twin = [f"{table.output}.{name}" for name in NAMES]
        same = all(prefix + name in stored for name in twin) and all(
            np.array_equal(np.asarray(stored[prefix + name].read(), np.float32), a)
            for name, a in zip(twin, (b_DR.T, a_RV.T), strict=True)
        )
        if not same or peft_lora.scale_of(config, table.output, rank) != scale:
            raise RequestError(
                f"{table.module} and {table.output} are one weight in the base, and their adapters differ"
            )
        used |= set(twin)
    return peft_lora.Pair(a_RV.T, b_DR.T, scale, None), used


def nodes(table: Table, w: Any) -> dict[str, Any]:
    """Return {module name in the Hugging Face format: weight with adapter} for the token embedding table.

    If the output projection is tied to the table, the projection gets an adapter with the same two matrices,
    transposed.
    """
    found = {table.module: w}
    if table.output:
        found[table.output] = weights.LowRank(w.base, w.b.T, w.a.T, w.scale)
    return found
