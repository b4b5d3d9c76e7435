"""Train the task's head and freeze all other parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    from llmctl.model.config import ModelConfig


class Head(Method):
    """Train only the task's head."""

    name = "head"

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names: True for the trained arrays, which are the arrays of the task's head.

        Raises:
          RequestError: If the task has no head of its own.
        """
        if "head" not in params:
            raise RequestError(
                f"method = 'head': task {config.task!r} has no head of its own to train; use another method"
            )
        return super().trains(config, model, params)


METHOD = Head()
