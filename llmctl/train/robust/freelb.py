"""FreeLB: the mean loss over the steps of ascent (Zhu et al., 2020, arXiv:1909.11764)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.robust.adversary import Adversary

if TYPE_CHECKING:
    import jax

    from llmctl.train.robust.one_pass import Found, Pull
    from llmctl.train.robust.perturbation import Search


class FreeLb(Adversary):
    """K steps cost K forward and backward passes: each gives the gradients of the weights and the next perturbation.

    Dropout is the same in all steps of a batch, as in the paper.
    """

    name = "freelb"
    reads = {"epsilon": 5.0, "norm": "l2", "steps": 3, "step_size": 2.0, "start": 3.0}

    def cost(self, config: Any) -> float:
        """See Adversary."""
        return float(self.options(config)["steps"])

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """See Adversary; losses, sums and gradients are means over the steps."""
        import jax
        import jax.numpy as jnp

        def step(carry: Any, _: None) -> tuple[Any, None]:
            offset, total = carry
            found, gradients, rises = pull(offset)
            return (search.ascend(offset, rises), jax.tree.map(jnp.add, total, (found, gradients))), None

        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(pull, begin)[:2])
        (_, total), _ = jax.lax.scan(step, (begin, zero), None, length=search.steps)
        return jax.tree.map(lambda a: a / search.steps, total)


METHOD = FreeLb()
