"""Define the settings of the finetuning methods, each a section of `finetune`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from llmctl.config.base import Config as Settings


class LoraConfig(Settings):
    """Set ranks, scales and targets of low-rank adapters. The adapted matrices are frozen."""

    common: ClassVar[tuple[str, ...] | None] = ("rank",)
    added: ClassVar[frozenset[str]] = frozenset({"rslora", "plus_ratio", "rank_pattern", "alpha_pattern"})

    rank: int = Field(default=8, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the adapters: each update is multiplied by alpha / rank."""
    targets: list[str] = []
    """Matrices of each block that get an adapter: q, k, v, o, gate, up, down; empty means all."""
    rslora: bool = False
    """Scale updates by alpha / sqrt(rank), so that higher ranks do not learn more slowly (rsLoRA)."""
    plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of each pair's second matrix, as a multiple of the first matrix's rate (LoRA+ advises 16)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Ranks of single matrices, by name (q) or by module (attn/q). Other matrices use `rank`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of single matrices, by name (q) or by module (attn/q). Other matrices use `alpha`."""


class AdaLoraConfig(Settings):
    """Set the rank budget that matrices share (AdaLoRA). `lora` sets the mean rank at the end, alpha and targets."""

    common: ClassVar[tuple[str, ...] | None] = ()

    initial: float = Field(default=1.5, ge=1)
    """Rank of each adapter at the start, as a multiple of `lora.rank`."""
    warmup: float = Field(default=0.1, ge=0)
    """Number of first steps without removed ranks; below 1 a fraction of all steps."""
    final: float = Field(default=0.3, gt=0)
    """Number of last steps with fixed ranks; below 1 a fraction of all steps."""
    interval: int = Field(default=10, ge=1)
    """Number of steps between reductions of the ranks."""
    sensitivity: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average of the sensitivities |weight * gradient|."""
    uncertainty: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average of uncertainties, the absolute deviations of sensitivities from their average."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Weight of the penalty on singular vectors that are not orthogonal."""
