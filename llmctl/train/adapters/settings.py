"""Define the settings of the finetuning methods, each a section of `finetune`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmctl.config.base import Config as Settings


class LoraConfig(Settings):
    """Set ranks, scales and targets of low-rank adapters. The adapted matrices are frozen."""

    common: ClassVar[tuple[str, ...] | None] = ("rank",)
    added: ClassVar[frozenset[str]] = frozenset(
        {"rslora", "plus_ratio", "rank_pattern", "alpha_pattern", "modules_to_save"}
    )

    rank: int = Field(default=8, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the adapters: each update is multiplied by alpha / rank."""
    targets: list[str] = []
    """Matrices that get an adapter: q, k, v, o, gate, up, down of each block; lm_head, the output projection; embed,
    the token table (method lora). Empty means all of the blocks."""
    rslora: bool = False
    """Scale updates by alpha / sqrt(rank), so that higher ranks do not learn more slowly (rsLoRA)."""
    plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of each pair's second matrix, as a multiple of the first matrix's rate (LoRA+ advises 16)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Ranks of single matrices, by name (q) or by module (attn/q). Other matrices use `rank`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of single matrices, by name (q) or by module (attn/q). Other matrices use `alpha`."""
    modules_to_save: list[str] = []
    """Modules to train in full beside the adapters, such as embed, lm_head, norm or attn_norm (PEFT's name)."""


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


class HoulsbyConfig(Settings):
    """Bottleneck adapters in the layers."""

    common: ClassVar[tuple[str, ...] | None] = ()

    size: int = Field(default=64, ge=1)
    """Width of each adapter."""
    form: Literal["sequential", "parallel"] = "sequential"
    """Position: after each sublayer (Houlsby et al.), or beside the feed-forward layer (He et al.)."""
    scale: float = Field(default=0.0, ge=0)
    """Factor on the adapters' output; 0 takes 1 if sequential and 4 if parallel."""


class TrainedConfig(Settings):
    """Choice of what is trained, and how fast. Level 0 is everything after the layers, such as the task's head."""

    common: ClassVar[tuple[str, ...] | None] = ()

    last_layers: int = Field(default=0, ge=0)
    """Number of last layers of each stack to train; the layers before and the embeddings are frozen. 0 trains all."""
    patterns: list[str] = []
    """Method full: patterns of the parameters to train beside the task's head, such as norm or attn/*/bias; each
    matches a part of a name. Empty trains all."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate per level: once for the last layer, twice for the one before, and so on down to the
    embeddings."""
    head_rate: float = Field(default=1.0, gt=0)
    """Learning rate of the task's head, as a multiple of the others'."""
    unfreeze_every: float = Field(default=0.0, ge=0)
    """Steps after which one more layer of each stack is trained, from the last to the first and then the embeddings;
    the task's head is trained first. Below 1 a fraction of all steps. 0 trains all from the start."""
