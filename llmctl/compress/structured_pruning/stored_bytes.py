"""Count the bytes that a pruned model's arrays have in memory, from the arrays of the unpruned model.

The dtypes stay as they are, and every axis follows the sizes of the config. A mean number of bits per parameter would
be wrong: pruning removes integers from the layers, and the floats of the embeddings stay.
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
    """Describe how the length of an array's axis follows the config."""

    length: int
    """Length before pruning."""
    whole: int = 1
    """Length of the weight's axis before pruning. An axis of scales may be shorter."""
    field: str = ""
    """Field of the config that the axis follows; empty for a fixed length."""
    count: int = 0
    """Value of the field before pruning."""
    growth: int = 0
    """Growth of the weight's axis if the field grows by 1."""

    def at(self, model: ModelConfig) -> int:
        """Return the length if the model had another config."""
        if not self.field:
            return self.length
        return self.length * (self.whole + self.growth * (getattr(model, self.field) - self.count)) // self.whole


def counter(cfg: ModelConfig, params: dict[str, Any]) -> Size:
    """Return a function that computes the bytes of the arrays if the model had the sizes of another config.

    Args:
      cfg: config of the model.
      params: its parameters; they may be abstract.
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
    """Return the shapes of all weights if a field of the config had twice its value.

    Twice the key/value heads have twice the query heads, whose axes are therefore looked for first.
    """
    update: dict[str, Any] = {name: 2 * getattr(cfg, name), "preset": ""}
    if name == "kv_heads":
        update["heads"] = 2 * cfg.heads
    return {path: a.shape for path, a in weights.flatten(functional.abstract(cfg.model_copy(update=update))).items()}
