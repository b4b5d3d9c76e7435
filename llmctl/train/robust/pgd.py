"""Train on rows perturbed by several steps of projected gradient ascent (PGD; Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.robust.adversary import Adversary
from llmctl.train.robust.fgm import check_share, mixed

if TYPE_CHECKING:
    import jax

    from llmctl.train.robust.one_pass import Found, Pull
    from llmctl.train.robust.perturbation import Search


class Pgd(Adversary):
    """Search for a perturbation by several gradient steps, and train on the rows with the last perturbation.

    The first perturbation is random. Each step is projected onto the ball of radius epsilon.
    """

    name = "pgd"
    reads = {"epsilon": 0.02, "norm": "l2", "steps": 3, "step_size": 0.01, "start": 0.02, "weight": 1.0}

    def check(self, config: Any) -> None:
        """Check the settings as Adversary.check does, and check that `weight` is at most 1."""
        super().check(config)
        check_share(config)

    def cost(self, config: Any) -> float:
        """Return the cost of the method: FLOPs of a training step with the method, divided by FLOPs without the method.

        A search step costs 2/3 of a training step, because it needs no gradients of the weights.
        """
        options = self.options(config)
        return 1.0 + options["steps"] * 2 / 3 + (options["weight"] < 1)

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """Return loss and gradients at the last perturbation.

        If the setting `weight` is below 1, clean rows are used too. Loss and gradients are then weight * perturbed +
        (1 - weight) * clean. The metric sums come from the perturbed rows.
        """
        import jax
        import jax.numpy as jnp

        def step(offset: jax.Array, _: None) -> tuple[jax.Array, None]:
            return search.ascend(offset, pull(offset)[2]), None

        offset = jax.lax.scan(step, begin, None, length=search.steps)[0]
        perturbed, gradients, _ = pull(offset)
        if search.weight == 1:
            return perturbed, gradients
        clean = pull(jnp.zeros_like(begin))[:2]
        return mixed(search.weight, clean, (perturbed, gradients), sums=perturbed[1])


METHOD = Pgd()
