"""Train on the mean loss over the steps of gradient ascent (FreeLB; Zhu et al., 2020, arXiv:1909.11764)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.robust.adversary import Adversary

if TYPE_CHECKING:
    import jax

    from llmctl.train.robust.one_pass import Found, Pull
    from llmctl.train.robust.perturbation import Search


class FreeLb(Adversary):
    """Perturb embeddings by steps of gradient ascent on the loss. The gradients of the weights are averaged over all
    steps.

    K steps therefore cost K forward and backward passes. Dropout is the same in all steps of a batch, as in the paper.
    """

    name = "freelb"
    reads = {"epsilon": 0.02, "norm": "l2", "steps": 3, "step_size": 0.01, "start": 0.01}

    def cost(self, config: Any) -> float:
        """Return the cost relative to training without the method. The cost is the number of ascent steps, because each
        step needs one pass.
        """
        return float(self.options(config)["steps"])

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """Return the means of losses, metric sums and gradients over the ascent steps."""
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
