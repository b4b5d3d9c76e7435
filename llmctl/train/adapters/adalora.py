"""Train low-rank adapters that share a budget of ranks (AdaLoRA; Zhang et al., 2023, arXiv:2303.10512).

The update of each matrix is scale * P diag(e) Q with nearly orthogonal P and Q. Training sets the least important
singular values e to zero, until the mean rank of the updates is `lora.rank`. For each update whose rank is above 0, the
artifact has two low-rank matrices, as in LoRA.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.config.settings import portion
from llmctl.train.adapters import targets
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    import jax

    from llmctl.artifacts.artifact import Artifact
    from llmctl.model import weights
    from llmctl.model.config import ModelConfig

DEVIATION = 0.02
"""Standard deviation of initial singular vectors, as in the authors' code."""


class AdaLora(Method):
    """Train low-rank updates of matrices, with a common budget of ranks, and train the task's head."""

    name = "adalora"
    settings = ("lora", "adalora", "merge")
    adapts = True

    def check(self, config: Any, base: Artifact) -> None:
        """Check the config as Method.check does, and reject settings that AdaLoRA does not support.

        Raises:
          RequestError: If AdaLoRA does not support a LoRA setting (such as `lora.rank_pattern`). If a setting freezes
            layers. If Method.check fails.
        """
        of_lora = {"rslora", "plus_ratio", "rank_pattern", "alpha_pattern", "modules_to_save"}
        given = config.lora.model_fields_set & of_lora
        if given:
            raise RequestError(f"lora.{min(given)}: not for method 'adalora', which chooses the ranks")
        freezing = {
            "trained.unfreeze_every": config.trained.unfreeze_every,
            "trained.last_layers": config.trained.last_layers,
            "freeze_layers": config.freeze_layers,
        }
        for setting, amount in freezing.items():
            if amount:
                raise RequestError(f"{setting}: not for method 'adalora', which takes ranks from frozen layers")
        super().check(config, base)

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with an adapter around each matrix of `lora.targets`, sharded over `mesh`.

        The adapter (`Svd`) has the form of a singular value decomposition. The singular values are initialized to zero,
        so the model's outputs do not change.
        """
        import jax
        import jax.numpy as jnp

        from llmctl.model import weights

        rank = math.ceil(config.adalora.initial * config.lora.rank)

        def svd(m: weights.Matrix, number: int) -> weights.Svd:
            *lead, inputs, outputs = m.weight.shape
            keys = jax.random.split(jax.random.fold_in(key, number))
            a = DEVIATION * jax.random.normal(keys[0], (*lead, inputs, rank))
            b = DEVIATION * jax.random.normal(keys[1], (*lead, rank, outputs))
            return weights.Svd(m.weight, a, b, jnp.zeros((*lead, 1, rank)), config.lora.alpha / rank)

        return targets.wrap(model, params, config.lora.targets, svd, mesh, "lora.targets")

    def during(self, config: Any, params: Params, steps: int) -> dict[str, Any]:
        """Return job settings that allocate the ranks, and that penalize non-orthogonal singular vectors.

        The result has fields of the training job (`llmctl.train.job.Job`), by name.

        Raises:
          RequestError: If no step is left between `adalora.warmup` and `adalora.final`.
        """
        from llmctl.model import weights
        from llmctl.train import rank_budget

        settings = config.adalora
        shapes = {path: w.e.shape for path, w in weights.of_type(params, weights.Svd).items()}
        start, final = (portion(amount, steps) for amount in (settings.warmup, settings.final))
        settled = steps - max(final, 1)
        if settled <= start:
            raise RequestError(
                f"adalora: {start} first and {final} last steps leave none of {steps} to allocate ranks in"
            )
        matrices = sum(math.prod(shape[:-2]) for shape in shapes.values())
        budget = rank_budget.Budget(
            first=sum(math.prod(shape) for shape in shapes.values()),
            last=matrices * config.lora.rank,
            start=start,
            settled=settled,
            interval=settings.interval,
        )
        ranks = rank_budget.Allocator(shapes, budget, settings.sensitivity, settings.uncertainty)

        def penalty(params: Params) -> jax.Array:
            apart = [weights.orthogonality(w) for w in weights.of_type(params, weights.Svd).values()]
            return settings.orthogonality * sum(apart[1:], apart[0]) / (2 * matrices)

        return {"memory": ranks.memory, "after_step": ranks.after_step, "penalty": penalty, "best_from": settled}

    def finish(self, config: Any, params: Params) -> Params:
        """Return the parameters with each adapter replaced by a low-rank pair, as in LoRA.

        A pair contains only the singular values that training kept.
        """
        from llmctl.model import weights

        return weights.updated(
            params, {path: w.truncated() for path, w in weights.of_type(params, weights.Svd).items()}
        )


METHOD = AdaLora()
