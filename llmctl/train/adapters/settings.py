"""Settings of the finetuning methods, each a section of `finetune`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmctl.config.base import Config as Settings


class LoraConfig(Settings):
    """Low-rank adapters beside frozen matrices."""

    common: ClassVar[tuple[str, ...] | None] = ("rank",)

    rank: int = Field(default=8, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the update, times the rank: updates are scaled by alpha / rank."""
    targets: list[str] = []
    """Matrices of each block that get an adapter: q, k, v, o, gate, up, down; empty means all."""
