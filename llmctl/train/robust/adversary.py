"""Define adversarial methods: their settings, the loss that they make of a task's loss, and its cost.

A new method is a subclass whose instance is registered in `llmctl.train.robust.registry`. Most override `passes`, which
calls `pull`, one forward and backward pass at a perturbation, as often as the method needs:

    class Noise(Adversary):
        name = "noise"
        reads = {"start": 1.0}

        def passes(self, search, begin, pull):
            found, gradients, _ = pull(begin)
            return found, gradients

    METHOD = Noise()

Modules of methods import JAX only inside functions, because the settings import them and must load without JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import jax

    from llmctl.model.losses import Loss
    from llmctl.train.robust.one_pass import Found, Pull
    from llmctl.train.robust.perturbation import Search
    from llmctl.train.robust.problem import Problem


class Adversary:
    """Adversarial method. By default it turns the loss of a task into that of perturbed rows by `passes`.

    Example:
      >>> from llmctl.train.robust.registry import ADVERSARIES
      >>> from llmctl.train.robust.settings import AdversarialConfig
      >>> freelb = ADVERSARIES["freelb"]
      >>> freelb.options(AdversarialConfig(method="freelb", steps=2))["steps"], freelb.reads["steps"]
      (2, 3)
    """

    name: ClassVar[str]
    """Name in the registry."""
    reads: ClassVar[Mapping[str, Any]]
    """Settings that the method reads, with their defaults."""
    compares: ClassVar[bool] = False
    """Whether the loss compares outputs of the network, which not every task allows."""

    def options(self, config: Any) -> dict[str, Any]:
        """Return the settings of the method, with defaults for those that are not given."""
        options = {k: default if (v := getattr(config, k)) in (None, "") else v for k, default in self.reads.items()}
        if "start" in options and config.start is None:
            options["start"] = min(options["start"], options["epsilon"])
        return options

    def check(self, config: Any) -> None:
        """Raise ValueError if settings contradict one another."""
        options = self.options(config)
        if options.get("start", 0.0) > options.get("epsilon", float("inf")):
            raise ValueError(f"start: {options['start']:g} is beyond epsilon = {options['epsilon']:g}")

    def cost(self, config: Any) -> float:
        """Return the operations of a step, relative to a step without the method."""
        raise NotImplementedError

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """Return the loss with its sums, and its gradients, which the method computes on the way.

        Args:
          search: settings of the steps.
          begin: perturbation [B, T, D] before the first step; zero without `start`.
          pull: one forward and backward pass.
        """
        raise NotImplementedError

    def loss(self, config: Any, problem: Problem, own: Loss) -> Loss:
        """Return the loss of the method.

        Args:
          config: the section of settings.
          problem: the task, the network and its training options.
          own: loss of the task.
        """
        from llmctl.train.robust import one_pass

        return one_pass.wrapped(own, self.passes, self.options(config), problem)

    def memory(self, config: Any) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """Return a function from the trained arrays to what the loss remembers between steps, by name."""
        return None

    def remember(self, config: Any, steps: int, memory: dict[str, Any], named: dict[str, Any], step: Any) -> Any:
        """Return the method's memory after a step, from the trained arrays after it. `step` counts from 1."""
        return {}
