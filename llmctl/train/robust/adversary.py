"""Define the interface of adversarial training methods: settings, loss and cost.

A new method is a subclass of `Adversary`. An instance of the subclass is registered in `llmctl.train.robust.registry`.
Most methods override `passes`, which gets a function `pull`. Each call of `pull` runs one forward and backward pass
with a given perturbation of the embeddings:

    class Noise(Adversary):
        name = "noise"
        reads = {"start": 1.0}

        def passes(self, search, begin, pull):
            found, gradients, _ = pull(begin)
            return found, gradients

    METHOD = Noise()

The modules of settings import the modules of methods, and must load without JAX. Modules of methods therefore import
JAX only inside functions.
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
    """Define an adversarial training method, which changes the loss that finetuning minimizes.

    By default, the loss is computed by the method `passes`, on perturbed rows (token sequences) of the batch.

    Example:
      >>> from llmctl.train.robust.registry import ADVERSARIES
      >>> from llmctl.train.robust.settings import AdversarialConfig
      >>> freelb = ADVERSARIES["freelb"]
      >>> freelb.options(AdversarialConfig(method="freelb", steps=2))["steps"], freelb.reads["steps"]
      (2, 3)
    """

    name: ClassVar[str]
    """Name of the method in the registry of adversarial methods."""
    reads: ClassVar[Mapping[str, Any]]
    """Settings that the method reads, with their default values."""
    compares: ClassVar[bool] = False
    """Whether the loss compares the outputs of two forward passes. Some tasks do not support this comparison."""

    def options(self, config: Any) -> dict[str, Any]:
        """Return the value of each setting that the method reads: the value in `config`, or the default."""
        options = {k: default if (v := getattr(config, k)) in (None, "") else v for k, default in self.reads.items()}
        if "start" in options and config.start is None:
            options["start"] = min(options["start"], options["epsilon"])
        return options

    def check(self, config: Any) -> None:
        """Check the settings of the method.

        Raises:
          ValueError: If settings contradict one another.
        """
        options = self.options(config)
        if options.get("start", 0.0) > options.get("epsilon", float("inf")):
            raise ValueError(f"start: {options['start']:g} is beyond epsilon = {options['epsilon']:g}")

    def cost(self, config: Any) -> float:
        """Return the cost of the method: FLOPs of a training step with the method, divided by FLOPs without the
        method."""
        raise NotImplementedError

    def passes(self, search: Search, begin: jax.Array, pull: Pull) -> tuple[Found, Any]:
        """Return ((sum of losses, metric sums), gradients of the trained arrays) of one batch.

        Args:
          search: object that computes the next perturbation from the last perturbation and its gradient.
          begin: perturbation [B, T, D] before the first step. The perturbation is zero if the method has no setting
              `start`.
          pull: function from a perturbation to ((sum of losses, metric sums), gradients of the trained arrays, gradient
              of the perturbation).
        """
        raise NotImplementedError

    def loss(self, config: Any, problem: Problem, own: Loss) -> Loss:
        """Return a loss function that applies the adversarial method to the loss of the task.

        Args:
          config: the section `adversarial` of the settings.
          problem: the task's loss, split into functions that prepare the batch, run the network and compute the loss.
            Methods that compare outputs call these functions.
          own: loss of the task as one function.
        """
        from llmctl.train.robust import one_pass

        return one_pass.wrapped(own, self.passes, self.options(config), problem)

    def memory(self, config: Any) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """Return a function that creates the arrays that the loss keeps between steps. If the loss keeps no arrays,
        return None.

        The function gets the trained arrays before the first step, and returns the arrays to keep, by name.
        """
        return None

    def remember(self, config: Any, steps: int, memory: dict[str, Any], named: dict[str, Any], step: Any) -> Any:
        """Return the arrays that the loss keeps between steps, updated after a step.

        Args:
          config: the section `adversarial` of the settings.
          steps: number of training steps.
          memory: the arrays before the step, by name.
          named: the trained arrays after the step.
          step: number of the step, from 1.
        """
        return {}
