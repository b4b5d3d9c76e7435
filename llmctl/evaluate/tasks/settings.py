"""Settings of single tasks, each a section of `finetune`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from llmctl.config.base import Config


class PreferenceConfig(Config):
    """Loss of preferences (task preference)."""

    common: ClassVar[tuple[str, ...] | None] = ()

    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    """Loss on log-likelihoods of chosen and rejected completions. dpo and ipo compare them with those of the model
    without its adapters, so they need a method with adapters, such as lora. simpo compares means per token, without
    another model."""
    beta: float = Field(default=0.0, ge=0)
    """Scale of the log-likelihoods. A larger one stays closer to the model before training (dpo, ipo). 0 takes 0.1 for
    dpo and ipo, and 2 for simpo."""
    gap: float = Field(default=1.0, ge=0)
    """simpo: aim for the difference between the scaled mean log-likelihoods of chosen and rejected."""

    @property
    def scale(self) -> float:
        """Return `beta`, or the default of the loss."""
        return self.beta or (2.0 if self.loss == "simpo" else 0.1)
