"""SMART: outputs that change little under perturbation and from step to step (Jiang et al., 2020, arXiv:1911.03437).

The loss of clean rows gets two terms: the divergence between the outputs of clean rows and of the rows whose
perturbation makes it largest, and the divergence from the outputs of averaged weights (Bregman proximal point).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.train.robust.adversary import Adversary

if TYPE_CHECKING:
    from llmctl.model.losses import Loss
    from llmctl.train.robust.one_pass import Found
    from llmctl.train.robust.problem import Problem

EARLY, EARLY_DECAY = 0.1, 0.99
"""Fraction of the steps in which the average forgets faster, and its decay there, as in the paper."""


class Smart(Adversary):
    """Divergences are symmetric: the mean of both KL divergences, or the squared difference of numbers.

    The paper adds both directions, so its factors of 1 are 2 here.
    """

    name = "smart"
    compares = True
    reads = {
        "epsilon": 1.0,
        "norm": "linf",
        "steps": 1,
        "step_size": 1.0,
        "start": 0.01,
        "weight": 2.0,
        "proximal": 2.0,
        "momentum": 0.999,
    }

    def check(self, config: Any) -> None:
        """See Adversary; without a start the first gradient is zero: the divergence of equal outputs is the least."""
        super().check(config)
        if not self.options(config)["start"]:
            raise ValueError("start: method 'smart' needs one above 0, where the divergence has a gradient")

    def cost(self, config: Any) -> float:
        """See Adversary: two differentiated passes, a search without gradients of weights, and averaged weights."""
        options = self.options(config)
        return 2 + options["steps"] * 2 / 3 + bool(options["proximal"]) / 3

    def loss(self, config: Any, problem: Problem, own: Loss) -> Loss:
        """See Adversary; `own` is computed from its parts, so that its outputs are not computed twice."""
        import jax

        from llmctl.model import weights
        from llmctl.train.robust import one_pass, perturbation

        options = self.options(config)

        def loss(params: Any, batch: Any, key: jax.Array, *, memory: Any = None) -> Found:
            batch = problem.batch(batch, key)
            clean = params, problem.hidden(params, batch, key)
            total, sums = problem.loss(clean, batch)
            still, still_clean = jax.tree.map(jax.lax.stop_gradient, (params, clean))
            where = perturbation.site(problem.model, batch)
            search = perturbation.Search.of(options, where, still)

            def apart(offset_BTD: jax.Array) -> jax.Array:
                moved = still, problem.hidden(still, where.added(batch, offset_BTD), key)
                return problem.divergence(still_clean, moved, batch)

            offset_BTD = search.begin(where, jax.random.fold_in(key, one_pass.START))
            for _ in range(search.steps):
                offset_BTD = search.ascend(offset_BTD, jax.grad(apart)(offset_BTD))
            offset_BTD = jax.lax.stop_gradient(offset_BTD)
            moved = params, problem.hidden(params, where.added(batch, offset_BTD), key)
            total = total + options["weight"] * problem.divergence(clean, moved, batch)
            if options["proximal"]:
                mean = weights.rebuild(still, weights.arrays(still) | memory["average"])
                mean = jax.tree.map(jax.lax.stop_gradient, mean)
                past = mean, jax.lax.stop_gradient(problem.hidden(mean, batch, key))
                total = total + options["proximal"] * problem.divergence(clean, past, batch)
            return total, sums

        return loss

    def memory(self, config: Any) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """See Adversary: the average of the trained weights."""
        import jax
        import jax.numpy as jnp

        if not self.options(config)["proximal"]:
            return None
        return lambda named: {"average": jax.tree.map(jnp.copy, named)}

    def remember(self, config: Any, steps: int, memory: dict[str, Any], named: dict[str, Any], step: Any) -> Any:
        """See Adversary: average <- momentum * average + (1 - momentum) * weights."""
        import jax.numpy as jnp

        momentum = self.options(config)["momentum"]
        decay = jnp.where(step <= EARLY * steps, min(momentum, EARLY_DECAY), momentum)
        # An increment towards the new weights: arrays that do not change keep their bits.
        return {"average": {name: a + (1 - decay) * (named[name] - a) for name, a in memory["average"].items()}}


METHOD = Smart()
