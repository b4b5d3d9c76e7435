"""Train low-rank adapters (LoRA; Hu et al., 2021, arXiv:2106.09685) beside frozen matrices.

The matrices may be quantized (QLoRA; Dettmers et al., 2023, arXiv:2305.14314). Options are the scale of rsLoRA
(Kalajdzievski, 2023, arXiv:2312.03732) and the learning rates of LoRA+ (Hayou et al., 2024, arXiv:2402.12354).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.train.adapters import targets
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    import jax

    from llmctl.model import weights
    from llmctl.model.config import ModelConfig
    from llmctl.train.adapters.settings import LoraConfig


def attach(
    cfg: ModelConfig,
    params: Params,
    lora: LoraConfig,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    make: Callable[[Any, jax.Array, jax.Array, float], weights.LowRank] | None = None,
) -> Params:
    """Add a low-rank pair to every matrix of the blocks that `lora.targets` names; all of them if it is empty.

    a [..., I, R] is initialized uniformly, as in the LoRA authors' code (Kaiming, a = sqrt(5)), and b [..., R, O] to
    zero, so the model is unchanged at first.

    Args:
      cfg: config of the model.
      params: its parameters.
      lora: ranks, scales and targets.
      key: random key of a.
      mesh: the devices.
      make: function from (weight, a, b, scale) to the adapter; None makes a `LowRank`.

    Raises:
      RequestError: a target or a pattern names no matrix, a matrix has a pair already, or a rank does not fit
        (`check_rank`).
    """
    import jax
    import jax.numpy as jnp

    from llmctl.model import weights

    check_rank(params, lora)
    for field in ("rank_pattern", "alpha_pattern"):
        targets.check_pattern(params, lora.targets, getattr(lora, field), f"lora.{field}")

    def pair(m: weights.Matrix, number: int) -> weights.LowRank:
        rank = targets.of_matrix(m, lora.rank_pattern, lora.rank)
        alpha = targets.of_matrix(m, lora.alpha_pattern, lora.alpha)
        *lead, fan_in, fan_out = m.weight.shape
        bound, own = fan_in**-0.5, jax.random.fold_in(key, number)
        a = jax.random.uniform(own, (*lead, fan_in, rank), minval=-bound, maxval=bound)
        scale = alpha / (math.sqrt(rank) if lora.rslora else rank)
        return (make or weights.LowRank)(m.weight, a, jnp.zeros((*lead, rank, fan_out)), scale)

    return targets.wrap(cfg, params, lora.targets, pair, mesh, "lora.targets")


def check_rank(params: Params, lora: LoraConfig) -> None:
    """Check that the highest rank is not above the smaller side of every matrix: no update has a higher rank.

    Raises:
      RequestError: it is.
    """
    from llmctl.model import weights

    found = [m for m in weights.matrices(params, "block") if not lora.targets or m.name in lora.targets]
    rank, sides = max(lora.rank, *lora.rank_pattern.values(), 1), [min(m.weight.shape[-2:]) for m in found]
    if rank > max(sides, default=rank):
        raise RequestError(f"lora.rank = {rank:,} is above the smaller side of every matrix ({max(sides):,} at most)")


class Lora(Method):
    """Low-rank pairs and the task's head."""

    name = "lora"
    settings = ("lora", "merge")
    adapts = True

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """See Method."""
        return attach(model, params, config.lora, key, mesh)

    def rate(self, config: Any, name: str) -> float:
        """See Method; LoRA+ trains b faster than a."""
        from llmctl.model import weights

        return config.lora.plus_ratio if weights.parse(name).part == "b" else 1.0


METHOD = Lora()
