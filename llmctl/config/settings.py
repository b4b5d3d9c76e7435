"""Define the settings that several stages share: mesh, optimizer and training."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmctl.config.base import Config

Dtype = Literal["float32", "bfloat16"]
KVCache = Literal["", "int8", "fp8_e4m3", "int4"]
"""Format of cached keys and values; empty uses the dtype of the computation."""


def portion(amount: float, steps: int) -> int:
    """Convert a setting such as `warmup` to a number of steps: `amount`, or `amount * steps` if `amount` is below 1."""
    return round(amount * steps) if amount < 1 else round(amount)


class MeshConfig(Config):
    """Set the number of devices per mesh axis. -1 uses the remaining devices. At most one axis may be -1."""

    heading: ClassVar[str] = "Where it runs"
    common: ClassVar[tuple[str, ...] | None] = ()

    data: int = Field(default=-1, ge=-1)
    """Number of model replicas. Each replica reads different examples."""
    fsdp: int = Field(default=1, ge=-1)
    """Number of devices that shard one copy of the parameters. Each device reads different examples."""
    context: int = Field(default=1, ge=-1)
    """Number of devices that shard each sequence, and also the parameters. If above 1, the model uses ring
    attention."""
    tensor: int = Field(default=1, ge=-1)
    """Number of devices that shard each layer's heads and neurons, and the vocabulary."""
    pipeline: int = Field(default=1, ge=-1)
    """Number of pipeline stages. Each stage contains consecutive layers."""
    dcn: int = Field(default=0, ge=0)
    """Number of slices (chips joined by a fast network) with a slower network between them. Only the data axis spans
    slices. 0 detects the number, 1 treats all devices as one slice."""


class OptimConfig(Config):
    """Configure the optimizer and its learning-rate schedule."""

    heading: ClassVar[str] = "Training"
    common: ClassVar[tuple[str, ...] | None] = ("name", "learning_rate")

    name: Literal["adamw", "sgd", "adafactor", "lion", "muon"] = "adamw"
    """Optimizer. muon trains the matrices of the layers and uses AdamW for the other parameters. adafactor suits T5,
    whose initial embeddings are large."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate. For Adafactor, this rate is relative to each weight's scale. For Lion, use a rate 3 to 10
    times smaller than for AdamW."""
    schedule: Literal["cosine", "linear", "constant", "rsqrt", "wsd"] = "cosine"
    """Learning-rate schedule after the warm-up. wsd is constant and decays at the end. rsqrt is proportional to 1 /
    sqrt(step)."""
    warmup: float = Field(default=0.05, ge=0)
    """Number of warm-up steps. A value below 1 is a fraction of all steps."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of cosine, linear and wsd, as a fraction of the peak."""
    decay: float = Field(default=0.2, ge=0)
    """Number of final steps in which the schedule wsd decays the learning rate. A value below 1 is a fraction of all
    steps."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment, for AdamW and Lion."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the second moment for AdamW, and of the momentum for Lion."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the momentum, for SGD and Muon."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Constant added to the square root of the second moment, for AdamW."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices. Norms, biases and embeddings have no weight decay."""
    clip: float = Field(default=1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay rate of a moving average of the weights. The average is then validated and saved. 0 disables the
    average."""
    spike: float = Field(default=0.0, ge=0)
    """Number of standard deviations by which the gradient norm or the loss may exceed the running mean. If a step
    exceeds this limit, the step is skipped. 0 skips no step."""


class TrainConfig(Config):
    """Configure training: steps, batches, validation and checkpoints."""

    heading: ClassVar[str] = "Training"
    common: ClassVar[tuple[str, ...] | None] = ("steps", "epochs", "batch_size", "seq_len")
    added: ClassVar[frozenset[str]] = frozenset({"epochs"})
    exclusive: ClassVar[dict[str, str]] = {"epochs": "steps"}
    unkeyed: ClassVar[frozenset[str]] = frozenset(
        {"microbatches", "log_every", "checkpoint_every", "keep", "tensorboard", "wandb", "profile"}
    )

    steps: int = Field(default=1000, ge=1)
    """Number of optimizer steps."""
    epochs: float = Field(default=0.0, ge=0)
    """Passes over the training rows, in place of steps. The number of steps follows from the number of rows and
    batch_size."""
    batch_size: int = Field(default=32, ge=1)
    """Number of sequences per optimizer step, over all devices."""
    seq_len: int = Field(default=256, ge=2)
    """Number of tokens per sequence."""
    accumulate: int = Field(default=1, ge=1)
    """Number of microbatches per step. The accumulated gradient equals the gradient of the full batch."""
    microbatches: int = Field(default=0, ge=0)
    """Number of microbatches that pass through the pipeline (mesh.pipeline); 0 uses up to four per pipeline stage."""
    dtype: Dtype = "float32"
    """Dtype of the computation; master weights and optimizer state stay float32."""
    matmuls: dict[str, Literal["int8", "fp8"]] = {}
    """8-bit dtype of the forward and backward matrix products, by pattern of matrix names, such as {"mlp/*" =
    "int8"}."""
    attention: Literal["auto", "xla"] = "auto"
    """Attention implementation. auto: the platform's fused kernel (TPU, GPU), or XLA if the platform has no
    kernel. xla: always XLA."""
    remat: Literal["none", "minimal", "qkv", "full", "offload"] = "minimal"
    """Activations to recompute in the backward pass. none: no activations. minimal: all except the outputs of matrix
    products. offload: all except the outputs of matrix products and of attention, which are kept in host memory. qkv:
    all except queries, keys and values. full: all activations."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates only at the end."""
    eval_batches: int = Field(default=32, ge=1)
    """Maximum number of batches per validation."""
    patience: int = Field(default=0, ge=0)
    """Number of validations without improvement before training stops; 0 never stops early."""
    best_by: str = ""
    """Validation metric (loss, accuracy, …) that selects the best parameters; empty uses the stage's default."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing: weight of the uniform distribution in the targets."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of log(Z)^2 per token in the loss. This term limits the growth of logits. A usual value is 1e-4."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints of the training state."""
    keep: int = Field(default=2, ge=1)
    """Number of checkpoints to keep."""
    log_every: int = Field(default=10, ge=1)
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events to the run's folder `tensorboard`."""
    wandb: str = ""
    """Weights & Biases project to log to (extra `wandb`). If empty, nothing is logged there."""
    profile: str = ""
    """Steps to profile, as first:last. The trace is written next to the TensorBoard events, for TensorBoard or
    XProf."""

    @field_validator("profile")
    @classmethod
    def _is_a_span(cls, value: str) -> str:
        first, colon, last = value.partition(":")
        if value and not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"must be steps as first:last, such as 10:15, got {value!r}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        if self.epochs and "steps" in self.model_fields_set:
            raise ValueError("epochs and steps exclude each other: leave one of them out")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if (self.patience or self.best_by) and not self.eval_every:
            raise ValueError("patience and best_by compare validations on the way: set eval_every")
        return self
