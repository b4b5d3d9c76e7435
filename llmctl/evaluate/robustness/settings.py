"""Define the settings of the probe `robustness`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmctl.config.base import Config


class RobustnessConfig(Config):
    """Configure how texts are changed to measure robustness."""

    heading: ClassVar[str] = "Robustness"

    seed: int = Field(default=0, ge=0)
    """Seed of the random changes."""
