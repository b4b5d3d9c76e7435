"""Fast gradient method: clean rows, and rows one step along the gradient (Miyato et al., 2017, arXiv:1605.07725)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.train.robust.adversary import Adversary

if TYPE_CHECKING:
    import jax

    from llmctl.train.robust.one_pass import Found, Pull
    from llmctl.train.robust.perturbation import Search


class Fgm(Adversary):
    """The perturbation is epsilon * g / |g|, g the gradient of a row's loss. Two forward and backward passes."""

    name = "fgm"
    reads = {"epsilon": 5.0, "norm": "l2", "weight": 0.5}

    def check(self, config: Any) -> None:
        """See Adversary."""
        super().check(config)
        check_share(config)

    def cost(self, config: Any) -> float:
        """See Adversary."""
        return 2.0

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """See Adversary; the sums are those of clean rows."""
        clean, gradients, rises = pull(begin)
        perturbed, steeper, _ = pull(search.ascend(begin, rises))
        return mixed(search.weight, (clean, gradients), (perturbed, steeper), sums=clean[1])


def mixed(weight: float, clean: tuple[Found, Any], perturbed: tuple[Found, Any], sums: Any) -> tuple[Found, Any]:
    """Return (1 - weight) * clean + weight * perturbed, of losses and gradients, with the given sums."""
    import jax

    def mix(a: Any, b: Any) -> Any:
        return ((1 - weight) * a + weight * b).astype(a.dtype)

    total = mix(clean[0][0], perturbed[0][0])
    return (total, sums), jax.tree.map(mix, clean[1], perturbed[1])


def check_share(config: Any) -> None:
    """Raise ValueError if the weight of perturbed rows is above 1."""
    if config.weight is not None and config.weight > 1:
        raise ValueError(f"weight: {config.weight:g} is no share of the loss; method {config.method!r} takes up to 1")


METHOD = Fgm()
