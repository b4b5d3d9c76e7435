"""Train all parameters of the finetuned model, and the task's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    from llmctl.model.config import ModelConfig


class Full(Method):
    """Train all parameters."""

    name = "full"
    changes_base = True

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names that is always True, because all arrays are trained."""
        return lambda _: True


METHOD = Full()
