"""Keep outputs similar under perturbation and from step to step (SMART; Jiang et al., 2020, arXiv:1911.03437).

Two terms are added to the loss of clean (not perturbed) rows:

- the divergence between the outputs for clean and for perturbed rows, maximized over the perturbation
- the divergence between outputs of the current weights and outputs of the averaged weights (Bregman proximal point)
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
"""Early phase of training, as a fraction of all steps, and maximum decay of the weights' moving average in this phase.
Both values are from the paper."""


class Smart(Adversary):
    """Add two output divergences to the loss: clean versus perturbed rows, and current versus averaged weights.

    A divergence is the mean of the KL divergences in both directions. If the task predicts numbers, the divergence is
    the squared difference. The paper adds both directions in place of their mean, so each factor is twice the factor in
    the paper.
    """

    name = "smart"
    compares = True
    reads = {
        "epsilon": 0.02,
        "norm": "linf",
        "steps": 1,
        "step_size": 0.02,
        "start": 0.001,
        "weight": 2.0,
        "proximal": 2.0,
        "momentum": 0.999,
    }

    def check(self, config: Any) -> None:
        """Check the settings as Adversary.check does, and check that `start` is above 0.

        If the first perturbation were zero, the outputs for clean and perturbed rows would be equal. The divergence
        would then be minimal and its gradient zero, so the search could not start.
        """
        super().check(config)
        if not self.options(config)["start"]:
            raise ValueError("start: method 'smart' needs one above 0, where the divergence has a gradient")

    def cost(self, config: Any) -> float:
        """Return the cost of the method: FLOPs of a training step with the method, divided by FLOPs without the method.

        The result is 2 for the passes of clean and of perturbed rows, plus 2/3 per search step. If the moving average
        of the weights is used, 1/3 is added.
        """
        options = self.options(config)
        return 2 + options["steps"] * 2 / 3 + bool(options["proximal"]) / 3

    def loss(self, config: Any, problem: Problem, own: Loss) -> Loss:
        """Return the training loss: the task's loss on clean rows, and the two divergences.

        The loss is computed from the parts in `problem` instead of `own`. The outputs for clean rows are therefore
        computed only once.
        """
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
        """Return a function from the trained arrays to their initial moving average. If `proximal` is 0, return
        None."""
        import jax
        import jax.numpy as jnp

        if not self.options(config)["proximal"]:
            return None
        return lambda named: {"average": jax.tree.map(jnp.copy, named)}

    def remember(self, config: Any, steps: int, memory: dict[str, Any], named: dict[str, Any], step: Any) -> Any:
        """Return the updated moving average: momentum * average + (1 - momentum) * weights."""
        import jax.numpy as jnp

        momentum = self.options(config)["momentum"]
        decay = jnp.where(step <= EARLY * steps, min(momentum, EARLY_DECAY), momentum)
        # An increment towards the new weights: arrays that do not change keep their bits.
        return {"average": {name: a + (1 - decay) * (named[name] - a) for name, a in memory["average"].items()}}


METHOD = Smart()
