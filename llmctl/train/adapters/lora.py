"""Train low-rank adapters (LoRA; Hu et al., 2021, arXiv:2106.09685) beside frozen matrices.

The matrices may be quantized (QLoRA; Dettmers et al., 2023, arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    import jax

    from llmctl.model.config import ModelConfig


def attach(
    cfg: ModelConfig,
    params: Params,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> Params:
    """Add a low-rank pair to every matrix of the blocks whose name (q, k, v, o, gate, up, down) is in `targets`.

    If `targets` is empty, all matrices get a pair. a [..., I, R] is initialized uniformly, as in the LoRA authors' code
    (Kaiming, a = sqrt(5)), and b [..., R, O] to zero, so the model is unchanged at first. The update is scaled by
    alpha / rank.

    Raises:
      RequestError: a target names no matrix, or a matrix has a pair already.
    """
    import jax
    import jax.numpy as jnp

    from llmctl.model import functional, weights

    number = {path: i for i, path in enumerate(weights.flatten(params))}  # random keys do not depend on `targets`
    pairs: dict[str, weights.LowRank] = {}
    seen: set[str] = set()
    for m in weights.matrices(params, "block"):
        if targets and m.name not in targets:
            continue
        if m.node.has_adapter:
            raise RequestError(
                f"{m.path}: has a low-rank pair already; merge the parent first (finetune with merge = true)"
            )
        seen.add(m.name)
        *lead, fan_in, fan_out = m.weight.shape
        bound, own = fan_in**-0.5, jax.random.fold_in(key, number[m.path])
        a = jax.random.uniform(own, (*lead, fan_in, rank), minval=-bound, maxval=bound)
        pairs[m.path] = weights.LowRank(m.weight, a, jnp.zeros((*lead, rank, fan_out)), scale=alpha / rank)
    if missing := sorted(set(targets) - seen):
        raise RequestError(f"lora.targets: the model has no matrix {', '.join(missing)} in its blocks")
    tree = weights.updated(params, pairs)
    return jax.device_put(tree, functional.shardings(cfg, tree, mesh))


class Lora(Method):
    """Low-rank pairs and the task's head."""

    name = "lora"
    settings = ("lora", "merge")
    adapts = True

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """See Method."""
        lora = config.lora
        return attach(model, params, lora.rank, lora.alpha, lora.targets, key, mesh)


METHOD = Lora()
