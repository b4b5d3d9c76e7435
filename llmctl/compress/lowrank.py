"""Merge low-rank adapters (LoRA) into the matrices of a model before it is compressed.

Merging is refused if the result would undo an earlier quantization or pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.model import weights


def merged(base: Artifact, say: Callable[[str], None], *, requantizes: bool = False) -> dict[str, Any]:
    """Return a model's parameters with every low-rank adapter (LoRA) merged into its matrix.

    Args:
      base: artifact that is compressed.
      say: function that prints a line if any adapter is merged.
      requantizes: whether the caller quantizes the result. Only then may adapters of quantized matrices be merged.

    Raises:
      RequestError: If merging would convert integers to floats, or change the zeros of a pruned matrix.
    """
    pairs = {path: weights.as_node(w) for path, w in weights.adapted(base.params).items()}
    if not pairs:
        return base.params
    if base.manifest.pruned and not all(w.keeps_zeros for w in pairs.values()):
        raise RequestError(
            f"{base.path}: is pruned ({base.manifest.sparsity:.1%} zeros), and merging its low-rank pairs would fill "
            "the zeros; finetune the pruned artifact with method = 'full', which keeps them"
        )
    for path, w in pairs.items():
        if w.is_integer and not requantizes:
            raise RequestError(
                f"{base.path}: {path} has low-rank pairs on integers, and merging would undo the quantization; "
                "prune before quantizing"
            )
    on_integers = any(w.is_integer for w in pairs.values())
    say("merges the low-rank pairs" + (" into the dequantized matrices, and quantizes those" if on_integers else ""))
    return jax.jit(weights.merge_adapters)(base.params)
