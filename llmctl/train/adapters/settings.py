"""Define the settings of the finetuning methods. Each class is a section of the config of `llmctl finetune`."""

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
    """Matrices that get an adapter. In the layers: q, k, v, o, gate, up, down. Outside the layers: lm_head (output
    projection), and embed (token embeddings) if the method is `lora`. If empty, all matrices in the layers get an
    adapter, except the matrices of bottleneck adapters.
    """
    rslora: bool = False
    """Scale updates by alpha / sqrt(rank) instead of alpha / rank (rsLoRA). High ranks then learn as fast as low
    ranks."""
    plus_ratio: float = Field(default=1.0, gt=0)
    """Ratio of two learning rates per adapter: rate of the second matrix / rate of the first (16 in the paper on
    LoRA+). The adapter of the token embeddings is not affected."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Ranks of single matrices, by name (q) or by module and name (attn/q). All other matrices use `rank`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Values of alpha for single matrices, by name (q) or by module and name (attn/q). All other matrices use
    `alpha`."""
    modules_to_save: list[str] = []
    """Modules whose parameters are all trained, in addition to the adapters, such as embed, lm_head, norm or attn_norm.
    PEFT has the same setting."""


class AdaLoraConfig(Settings):
    """Set the rank budget that all adapters share, for the method `adalora`. At the end of training, the mean rank of
    the adapters is `lora.rank`.
    """

    common: ClassVar[tuple[str, ...] | None] = ()

    initial: float = Field(default=1.5, ge=1)
    """Rank of each adapter at the start, as a multiple of `lora.rank`."""
    warmup: float = Field(default=0.1, ge=0)
    """Number of steps before the first removal of ranks. A value below 1 is a fraction of all steps."""
    final: float = Field(default=0.3, gt=0)
    """Number of steps after the last removal of ranks. A value below 1 is a fraction of all steps."""
    interval: int = Field(default=10, ge=1)
    """Number of steps from one removal of ranks to the next."""
    sensitivity: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average of the sensitivities |weight * gradient|."""
    uncertainty: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average of the uncertainty: the absolute difference between a sensitivity and its moving
    average."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Weight of the penalty on singular vectors that are not orthogonal."""


class HoulsbyConfig(Settings):
    """Set size and form of the bottleneck adapters, for the method `houlsby`."""

    common: ClassVar[tuple[str, ...] | None] = ()

    size: int = Field(default=64, ge=1)
    """Number of inner activations of each adapter: the width of the bottleneck."""
    form: Literal["sequential", "parallel"] = "sequential"
    """Position of the adapters. sequential: after each sublayer (Houlsby et al.). parallel: parallel to the
    feed-forward layer (He et al.)."""
    scale: float = Field(default=0.0, ge=0)
    """Factor by which the adapters' output is multiplied. 0 means 1 for the sequential form and 4 for the parallel
    form."""


class PromptConfig(Settings):
    """Set the length and the initial values of a trained prompt, for the method `prompt`."""

    common: ClassVar[tuple[str, ...] | None] = ()

    tokens: int = Field(default=20, ge=1)
    """Number of trained vectors before every text."""
    init: Literal["vocabulary", "uniform"] = "vocabulary"
    """Initial values of the vectors. vocabulary: embeddings of random tokens of the vocabulary. uniform: sampled from
    [-0.5, 0.5]."""


class PrefixConfig(Settings):
    """Set the number and the initial values of trained keys and values, for the method `prefix`."""

    common: ClassVar[tuple[str, ...] | None] = ()

    tokens: int = Field(default=20, ge=1)
    """Number of trained keys and values before every text, per layer. They take the first positions, and the positions
    of the text follow."""
    projection: int = Field(default=0, ge=0)
    """Inner width of a two-layer network that computes all keys and values from trained vectors during training. The
    artifact contains only the outputs of the network. 0 trains the keys and values themselves.
    """
    deviation: float = Field(default=0.02, gt=0)
    """Standard deviation of new keys and values; PEFT uses 1. The value has no effect if `projection` is set."""


class TrainedConfig(Settings):
    """Set which parameters are trained, with which learning rates, and from which step."""

    common: ClassVar[tuple[str, ...] | None] = ()

    last_layers: int = Field(default=0, ge=0)
    """Number of layers to train, counted from the last layer of the encoder, and from the last layer of the decoder.
    Earlier layers and the embeddings are frozen. 0 trains all layers.
    """
    patterns: list[str] = []
    """Patterns for names of parameters to train, such as norm or attn/*/bias, if the method is `full`. A pattern
    matches any part of a name. The task's head is always trained. If empty, all parameters are trained."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate per layer, counted from the output. The factor is applied once to the last layer,
    twice to the second to last layer, and so on. The embeddings have the smallest rate."""
    head_rate: float = Field(default=1.0, gt=0)
    """Factor on the learning rate of the task's head. Other parameters are not affected."""
    unfreeze_every: float = Field(default=0.0, ge=0)
    """Number of steps after which one more layer of the encoder and of the decoder is trained (gradual unfreezing). At
    first only the task's head is trained, then the layers from the last to the first, then the embeddings. A value
    below 1 is a fraction of all steps. train.patience also counts validations before all layers are trained. 0 trains
    all layers from the start.
    """
