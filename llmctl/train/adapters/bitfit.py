"""Train the biases, including the biases of norms (BitFit; Ben Zaken et al., 2022, arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    from llmctl.model.config import ModelConfig


class BitFit(Method):
    """Train the biases and the task's head."""

    name = "bitfit"

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names: True for the trained arrays, which are the biases and the task's head.

        Raises:
          RequestError: If the layers have no biases, as in Llama and T5.
        """
        from llmctl.model import weights

        names = [weights.parse(name) for name in weights.arrays(params)]
        if not any(name.bias and name.stacked for name in names):
            raise RequestError(
                f"method = 'bitfit': trains biases, and the layers of family {model.family!r} have none; "
                "use method = 'ia3', which trains as few parameters"
            )

        def trained(name: str) -> bool:
            found = weights.parse(name)
            return found.bias or found.task_head

        return trained


METHOD = BitFit()
