"""Train all parameters, those of the parent and those of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    from llmctl.model.config import ModelConfig


class Full(Method):
    """All parameters."""

    name = "full"
    changes_base = True

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """See Method."""
        return lambda _: True


METHOD = Full()
