"""Projected gradient descent: rows after several steps of ascent (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.robust.adversary import Adversary
from llmctl.train.robust.fgm import check_share, mixed

if TYPE_CHECKING:
    import jax

    from llmctl.train.robust.one_pass import Found, Pull
    from llmctl.train.robust.perturbation import Search


class Pgd(Adversary):
    """Steps from a random start, each projected onto the ball of radius epsilon; then one pass at the last one."""

    name = "pgd"
    reads = {"epsilon": 5.0, "norm": "l2", "steps": 3, "step_size": 2.0, "start": 5.0, "weight": 1.0}

    def check(self, config: Any) -> None:
        """See Adversary."""
        super().check(config)
        check_share(config)

    def cost(self, config: Any) -> float:
        """See Adversary; a step of the search needs no gradients of weights, a third of the operations."""
        options = self.options(config)
        return 1.0 + options["steps"] * 2 / 3 + (options["weight"] < 1)

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """See Adversary; the sums are those of perturbed rows."""
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
