"""Count the bytes that a pruned model's arrays have in memory, from the arrays of the unpruned model.

Pruning keeps the dtypes. The config after pruning determines the length of every axis. A mean number of bits per
parameter would give a wrong result. For example, pruning may remove integers of the layers and keep floats of the
embeddings.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from llmctl.artifacts.fingerprint import type_bits
from llmctl.compress.structured_pruning.search_space import Size
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

FIELDS = ("layers", "encoder_layers", "heads", "kv_heads", "d_ff", "d_model", "vocab_size")
"""Fields of ModelConfig that structured pruning reduces."""


class Axis(NamedTuple):
    """Describe how the length of an array's axis depends on the config.

    A weight may be stored as several arrays, such as integers and scales. An axis of the scales may be shorter than the
    weight's axis.
    """

    length: int
    """Length of the array's axis before pruning."""
    whole: int = 1
    """Length of the weight's axis before pruning."""
    field: str = ""
    """Field of the config on which the length depends; empty for a fixed length."""
    count: int = 0
    """Value of the config's field `field` before pruning."""
    growth: int = 0
    """Growth of the weight's axis if the config's field `field` grows by 1."""

    def at(self, model: ModelConfig) -> int:
        """Return the length that this axis of the array has in a model with the config `model`."""
        if not self.field:
            return self.length
        return self.length * (self.whole + self.growth * (getattr(model, self.field) - self.count)) // self.whole


def counter(cfg: ModelConfig, params: dict[str, Any]) -> Size:
    """Return a function that computes the bytes of the model's arrays from the config after pruning.

    Args:
      cfg: config of the model.
      params: parameters of the model; they may be abstract.
    """
    before = {path: a.shape for path, a in weights.flatten(functional.abstract(cfg)).items()}
    counts = {name: count for name in FIELDS if (count := getattr(cfg, name))}
    twice = {name: _doubled(cfg, name) for name in counts}

    def axis(path: str, i: int, length: int) -> Axis:
        whole = before[path][i]
        if length == 1 < whole:  # such as one scale for all inputs
            return Axis(length)
        for name, shapes in twice.items():
            if more := shapes[path][i] - whole:
                return Axis(length, whole, name, counts[name], more // counts[name])
        return Axis(length)

    arrays = [
        (type_bits(str(a.dtype)), [axis(path, i, n) for i, n in enumerate(a.shape)])
        for path, w in weights.flatten(params).items()
        for a in weights.parts(w).values()
    ]

    def size(model: ModelConfig) -> float:
        return sum(-(-math.prod(a.at(model) for a in axes) * bits // 8) for bits, axes in arrays)

    return size


def _doubled(cfg: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes that all weights would have if a field of the config had twice its value.

    If the key/value heads are doubled, the query heads are doubled too.
    """
    update: dict[str, Any] = {name: 2 * getattr(cfg, name), "preset": ""}
    if name == "kv_heads":
        update["heads"] = 2 * cfg.heads
    return {path: a.shape for path, a in weights.flatten(functional.abstract(cfg.model_copy(update=update))).items()}
