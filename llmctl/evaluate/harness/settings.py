"""Define the settings of tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmctl.config.base import Config


class HarnessConfig(Config):
    """Configure the prompts and the permissions of lm-evaluation-harness tasks."""

    heading: ClassVar[str] = "Tasks of lm-evaluation-harness"
    common: ClassVar[tuple[str, ...] | None] = ()

    shots: int = Field(default=-1, ge=-1)
    """Number of few-shot examples (rows with their answers) in each prompt; -1 uses the number that the task sets.
    Tasks that require 0 keep 0."""
    seed: int = Field(default=1234, ge=0)
    """Seed that selects the few-shot examples."""
    chat_template: bool = False
    """Use the chat template of the artifact, with separate messages for each few-shot example and answer."""
    system: str = ""
    """Text of the system message. If there is no chat template, each prompt begins with this text."""
    allow_code: bool = False
    """Permit local task files that name Python code (such as `!function`), and tasks that run generated programs. By
    default, both are refused."""
    download: bool = False
    """Download data sets that are missing. By default no network is used."""
