"""LoRA (arXiv:2106.09685): low-rank pairs around frozen matrices, dense or quantized (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.config.errors import RequestError
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig


def attach(
    cfg: ModelConfig,
    params: dict[str, Any],
    rank: int,
    alpha: float,
    targets: Sequence[str],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Puts a pair of `rank` around every matrix of the blocks whose name (q, k, v, o, gate, up, down) is in `targets`,
    or around all of them where that is empty.

    a [..., I, R] starts uniform as the LoRA authors' code does (Kaiming, a = sqrt(5)), b [..., R, O] at zero, so the
    model is unchanged at first. The update is scaled by alpha / rank.

    Raises RequestError where a target names no matrix, or one has a pair already.
    """
    flat = weights.flatten(params)
    seen: set[str] = set()
    for i, (path, w) in enumerate(sorted(flat.items())):
        name = path.split("/")[-2] if path.endswith("/kernel") and "/blocks/" in path else ""
        if not name or (targets and name not in targets):
            continue
        if isinstance(w, weights.LowRank):
            raise RequestError(
                f"{path}: has a low-rank pair already; merge the parent first (finetune with merge = true)"
            )
        seen.add(name)
        *lead, fan_in, fan_out = w.shape
        bound = fan_in**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, i), (*lead, fan_in, rank), minval=-bound, maxval=bound)
        flat[path] = weights.LowRank(w, a, jnp.zeros((*lead, rank, fan_out)), alpha / rank)
    if missing := sorted(set(targets) - seen):
        raise RequestError(f"lora.targets: the model has no matrix {', '.join(missing)} in its blocks")
    tree = weights.unflatten(flat)
    return jax.device_put(tree, functional.shardings(cfg, tree, mesh))


def is_pair(name: str) -> bool:
    """True for the arrays of low-rank pairs, by name."""
    return name.endswith((":a", ":b"))
