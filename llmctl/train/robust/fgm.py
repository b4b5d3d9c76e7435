"""Train on clean rows and on rows perturbed along the gradient (FGM; Miyato et al., 2017, arXiv:1605.07725)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.robust.adversary import Adversary

if TYPE_CHECKING:
    import jax

    from llmctl.train.robust.one_pass import Found, Pull
    from llmctl.train.robust.perturbation import Search


class Fgm(Adversary):
    """Perturb the embeddings of each row by epsilon * g / |g|.

    g is the gradient of the loss with respect to these embeddings.

    A training step needs two forward and backward passes.
    """

    name = "fgm"
    reads = {"epsilon": 0.02, "norm": "l2", "weight": 0.5}

    def check(self, config: Any) -> None:
        """Check the settings as Adversary.check does, and check that `weight` is at most 1."""
        super().check(config)
        check_share(config)

    def cost(self, config: Any) -> float:
        """Return the cost relative to training without the method. The cost is 2, because clean and perturbed rows need
        one pass each.
        """
        return 2.0

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """Return the loss and the gradients of clean and perturbed rows together.

        Both are weight * perturbed + (1 - weight) * clean, for the setting `weight`. The metric sums come from the
        clean rows.
        """
        clean, gradients, rises = pull(begin)
        perturbed, steeper, _ = pull(search.ascend(begin, rises))
        return mixed(search.weight, (clean, gradients), (perturbed, steeper), sums=clean[1])


def mixed(weight: float, clean: tuple[Found, Any], perturbed: tuple[Found, Any], sums: Any) -> tuple[Found, Any]:
    """Return ((loss, metric sums), gradients) of clean and perturbed rows together.

    Loss and gradients are (1 - weight) * clean + weight * perturbed.

    Args:
        weight: Weight of the perturbed rows, from 0 to 1.
        clean: ((loss, metric sums), gradients) of the clean rows.
        perturbed: ((loss, metric sums), gradients) of the perturbed rows.
        sums: Metric sums of the result.
    """
    import jax

    def mix(a: Any, b: Any) -> Any:
        return ((1 - weight) * a + weight * b).astype(a.dtype)

    total = mix(clean[0][0], perturbed[0][0])
    return (total, sums), jax.tree.map(mix, clean[1], perturbed[1])


def check_share(config: Any) -> None:
    """Check that `weight`, the fraction of the loss that comes from perturbed rows, is at most 1.

    Raises:
      ValueError: If `weight` is above 1.
    """
    if config.weight is not None and config.weight > 1:
        raise ValueError(f"weight: {config.weight:g} is no share of the loss; method {config.method!r} takes up to 1")


METHOD = Fgm()
