"""The sections that several stages share: where to run (mesh), how to optimize, how to train."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmctl.config.base import Config

Dtype = Literal["float32", "bfloat16"]


class MeshConfig(Config):
    """Devices a mesh axis; -1 takes what is left. One axis at most may be -1."""

    heading: ClassVar[str] = "Where it runs"
    common: ClassVar[tuple[str, ...] | None] = ()

    data: int = Field(default=-1, ge=-1)
    """Replicas of the model that see different examples."""
    fsdp: int = Field(default=1, ge=-1)
    """Devices that share one copy of the parameters and see different examples."""
    context: int = Field(default=1, ge=-1)
    """Devices that share each sequence and one copy of the parameters; keys and values travel around in a ring."""
    tensor: int = Field(default=1, ge=-1)
    """Devices that share the heads, the neurons and the vocabulary of each layer."""
    pipeline: int = Field(default=1, ge=-1)
    """Stages that hold successive layers; pieces of a batch pass through them one after the other."""
    dcn: int = Field(default=0, ge=0)
    """Slices, with a slower network between them, that the data axis runs over; the other axes stay inside one. 0 is as
    many as the devices say, 1 takes all for one."""


class OptimConfig(Config):
    """The optimizer and its learning-rate schedule."""

    heading: ClassVar[str] = "Training"
    common: ClassVar[tuple[str, ...] | None] = ("name", "learning_rate")

    name: Literal["adamw", "sgd", "adafactor", "lion", "muon"] = "adamw"
    """The optimizer; muon takes the matrices of the layers and leaves the rest to AdamW. adafactor suits T5, whose
    embeddings begin large."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate. Adafactor's is relative to the size of each weight; Lion's is 3 to 10 times below AdamW's."""
    schedule: Literal["cosine", "linear", "constant", "rsqrt", "wsd"] = "cosine"
    """Shape after the warm-up: wsd holds the peak and falls at the end, rsqrt falls with the root of the step."""
    warmup: float = Field(default=0.05, ge=0)
    """Warm-up steps; below 1 a fraction of all steps."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of cosine, linear and wsd, as a fraction of the peak."""
    decay: float = Field(default=0.2, ge=0)
    """wsd: steps of the final decline; below 1 a fraction of all steps."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW and Lion: decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the second moment; Lion: of its momentum."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """SGD and Muon: decay of the momentum."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW: added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay (L2) on matrices; norms, biases and embeddings are left alone."""
    clip: float = Field(default=1.0, ge=0)
    """Global gradient norm to clip at; 0 does not clip."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is what gets validated and saved; 0 keeps none."""
    spike: float = Field(default=0.0, ge=0)
    """Skip a step whose gradient norm or loss is this many standard deviations above its running mean; 0 is off."""


class TrainConfig(Config):
    """The length of a run, its batches, and what is kept on the way."""

    heading: ClassVar[str] = "Training"
    common: ClassVar[tuple[str, ...] | None] = ("steps", "batch_size", "seq_len")
    unkeyed: ClassVar[frozenset[str]] = frozenset(
        {"microbatches", "log_every", "checkpoint_every", "keep", "tensorboard", "wandb", "profile"}
    )

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences an optimizer step, over all devices."""
    seq_len: int = Field(default=256, ge=2)
    """Tokens a sequence."""
    accumulate: int = Field(default=1, ge=1)
    """Microbatches a step; the gradients are those of the whole batch."""
    microbatches: int = Field(default=0, ge=0)
    """On a mesh with a pipeline: pieces in which a batch passes through its stages; 0 takes up to four a stage."""
    dtype: Dtype = "float32"
    """Compute type; master weights and optimizer state stay float32."""
    matmuls: dict[str, Literal["int8", "fp8"]] = {}
    """Matrices of the layers multiplied in 8 bits, forward and backward, by pattern, such as {"mlp/*" = "int8"}."""
    attention: Literal["auto", "xla"] = "auto"
    """The platform's fused kernel where it has one (TPU, GPU), or always the plain form."""
    remat: Literal["none", "minimal", "qkv", "full", "offload"] = "minimal"
    """What the backward pass recomputes: nothing, what is not a matrix product (minimal), that and attention while the
    products wait in the host's memory (offload), everything but queries, keys and values (qkv), everything."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates at the end alone."""
    eval_batches: int = Field(default=32, ge=1)
    """Batches a validation reads at most."""
    patience: int = Field(default=0, ge=0)
    """Stop after this many validations without a better metric; 0 never stops early."""
    best_by: str = ""
    """Validation metric (loss, accuracy, …) by whose best parameters the stage ends; empty leaves it to the stage."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the uniform distribution in the targets."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of log(Z)^2 a token, which keeps logits from drifting (1e-4 is usual)."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints of the training state."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    log_every: int = Field(default=10, ge=1)
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events, into the run's folder `tensorboard`."""
    wandb: str = ""
    """Weights & Biases project to log to as well (extra `wandb`)."""
    profile: str = ""
    """Steps to trace, as first:last, for TensorBoard or XProf; the trace lies with the TensorBoard events."""

    @field_validator("profile")
    @classmethod
    def _is_a_span(cls, value: str) -> str:
        first, colon, last = value.partition(":")
        if value and not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"must be steps as first:last, such as 10:15, got {value!r}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if (self.patience or self.best_by) and not self.eval_every:
            raise ValueError("patience and best_by compare validations on the way: set eval_every")
        return self
