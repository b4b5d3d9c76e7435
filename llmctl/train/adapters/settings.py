"""Settings of the finetuning methods, each a section of `finetune`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from llmctl.config.base import Config as Settings


class LoraConfig(Settings):
    """Low-rank adapters beside frozen matrices."""

    common: ClassVar[tuple[str, ...] | None] = ("rank",)
    added: ClassVar[frozenset[str]] = frozenset({"rslora", "plus_ratio", "rank_pattern", "alpha_pattern"})

    rank: int = Field(default=8, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the update, times the rank: updates are scaled by alpha / rank."""
    targets: list[str] = []
    """Matrices of each block that get an adapter: q, k, v, o, gate, up, down; empty means all."""
    rslora: bool = False
    """Scale updates by alpha / sqrt(rank), so that higher ranks do not learn more slowly (rsLoRA)."""
    plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of each pair's second matrix, as a multiple of the first's (LoRA+, which advises 16)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Ranks of single matrices, by name (q) or by module (attn/q); the others have `rank`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of single matrices, by name or by module as in `rank_pattern`; the others have `alpha`."""


class AdaLoraConfig(Settings):
    """Budget of ranks that move between matrices (AdaLoRA). `lora` has the mean rank at the end, alpha and targets."""

    common: ClassVar[tuple[str, ...] | None] = ()

    initial: float = Field(default=1.5, ge=1)
    """Rank of each adapter at the start, as a multiple of `lora.rank`."""
    warmup: float = Field(default=0.1, ge=0)
    """First steps, in which all ranks stay; below 1 a fraction of all steps."""
    final: float = Field(default=0.3, gt=0)
    """Last steps, in which the ranks are fixed; below 1 a fraction of all steps."""
    interval: int = Field(default=10, ge=1)
    """Steps between reductions of the ranks."""
    sensitivity: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average of the sensitivities |weight * gradient|."""
    uncertainty: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average of the sensitivities' deviations."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Weight of the penalty on singular vectors that are not orthogonal."""
