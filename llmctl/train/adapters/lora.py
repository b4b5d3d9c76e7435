"""Train low-rank adapters of frozen matrices (LoRA; Hu et al., 2021, arXiv:2106.09685).

The matrices of the model may be quantized (QLoRA; Dettmers et al., 2023, arXiv:2305.14314). Settings select the scale
of rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732) and the learning rates of LoRA+ (Hayou et al., 2024,
arXiv:2402.12354).
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
    """Return the parameters with a low-rank pair for each target matrix: `a` [..., I, R] and `b` [..., R, O].

    The pair adds scale * a @ b to the matrix [..., I, O]. I is the number of inputs, O the number of outputs, and R the
    rank. `a` is initialized by Kaiming's uniform distribution (negative slope sqrt(5)), as in the LoRA authors' code.
    `b` is zero, so the model's outputs do not change. For the token embeddings, `a` is zero and `b` is normally
    distributed, as in PEFT.

    Args:
      cfg: config of the model.
      params: parameters of the model.
      lora: ranks R, scales and targets. If `lora.targets` is empty, all matrices of the layers are targets.
      key: random key of the initialization.
      mesh: the devices.
      make: function from (weight, a, b, scale) to the adapter; None creates a `LowRank`.

    Raises:
      RequestError: If a target or a pattern names no matrix. If a matrix already has a pair. If the rank exceeds the
        smaller side of every matrix (`check_rank`).
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
        if m.place == "embedding":
            b = jax.random.normal(own, (rank, fan_out))
            return weights.LowRank(m.weight, jnp.zeros((fan_in, rank)), b, scale_of(alpha, rank))
        a = jax.random.uniform(own, (*lead, fan_in, rank), minval=-bound, maxval=bound)
        return (make or weights.LowRank)(m.weight, a, jnp.zeros((*lead, rank, fan_out)), scale_of(alpha, rank))

    def scale_of(alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if lora.rslora else rank)

    return targets.wrap(cfg, params, lora.targets, pair, mesh, "lora.targets", table=make is None)


def check_rank(params: Params, lora: LoraConfig) -> None:
    """Check that the highest configured rank is possible for at least one matrix.

    The rank of a low-rank update cannot exceed the smaller side of its matrix.

    Raises:
      RequestError: If the rank is above the smaller side of every matrix.
    """
    found = targets.selected(params, lora.targets)
    rank, sides = max(lora.rank, *lora.rank_pattern.values(), 1), [min(m.weight.shape[-2:]) for m in found]
    if rank > max(sides, default=rank):
        raise RequestError(f"lora.rank = {rank:,} is above the smaller side of every matrix ({max(sides):,} at most)")


class Lora(Method):
    """Train low-rank adapters (two matrices whose product is added to a frozen matrix) and the task's head."""

    name = "lora"
    settings = ("lora", "merge")
    adapts = True

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with a low-rank adapter around each matrix of `lora.targets`, sharded over `mesh`."""
        return attach(model, params, config.lora, key, mesh)

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names: True for arrays that are trained.

        These are the adapters, the task's head and the modules in `lora.modules_to_save`.

        Raises:
          RequestError: If a module to save does not exist, has an adapter, or is quantized.
        """
        from llmctl.model import weights

        saved, own = config.lora.modules_to_save, super().trains(config, model, params)
        flat = weights.flatten(params)
        for module in saved:
            paths = [path for path in flat if weights.parse(path).belongs(module)]
            if not paths:
                raise RequestError(f"lora.modules_to_save: the model has no module {module}")
            for path in paths:
                node = weights.as_node(flat[path])
                if node.has_adapter or node.is_integer:
                    what = "has an adapter; leave it out of lora.targets" if node.has_adapter else "is quantized"
                    raise RequestError(f"lora.modules_to_save: {path} {what}")
        return lambda name: own(name) or any(weights.parse(name).belongs(module) for module in saved)

    def rate(self, config: Any, name: str) -> float:
        """Return the factor by which the learning rate of an array is multiplied.

        In LoRA+, the factor is `lora.plus_ratio` for the second matrix `b` of each adapter, and 1 for all other arrays.
        In the adapter of the token embeddings, `a` starts at zero instead of `b`. Its `b` therefore has the factor 1
        too.
        """
        from llmctl.model import weights

        found = weights.parse(name)
        return config.lora.plus_ratio if found.part == "b" and found.place != "embedding" else 1.0


METHOD = Lora()
