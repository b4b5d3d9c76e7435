"""Low-rank pairs that a finetuning left apart: merged before compression, unless that would undo a parent's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llmctl.artifact import Artifact
from llmctl.errors import RequestError
from llmctl.weights import LowRank, Quantized, flatten, merge_low_rank


def merged(base: Artifact, say: Callable[[str], None], *, requantizes: bool = False) -> dict[str, Any]:
    """The parameters without low-rank pairs; `say` hears of a merge.

    `requantizes`: the stage quantizes what comes out, so pairs on integers may be merged too.
    Raises RequestError where merging would turn integers into floats or fill pruned zeros.
    """
    pairs = [w for w in flatten(base.params).values() if isinstance(w, LowRank)]
    if not pairs:
        return base.params
    if base.manifest.sparsity > 0.01:
        raise RequestError(
            f"{base.path}: has low-rank pairs on matrices pruned to {base.manifest.sparsity:.0%} zeros, which merging "
            "would fill; finetune the pruned artifact with method = 'full', which keeps the zeros"
        )
    on_integers = any(isinstance(w.base, Quantized) for w in pairs)
    if on_integers and not requantizes:
        raise RequestError(
            f"{base.path}: has low-rank pairs on integers, and merging would undo the quantization; "
            "prune before quantizing"
        )
    say("merges the low-rank pairs" + (" into the dequantized matrices, and quantizes those" if on_integers else ""))
    return jax.jit(merge_low_rank)(base.params)
