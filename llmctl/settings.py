"""The sections that several stages share: where to run (mesh), how to optimize, how to train."""

from typing import ClassVar, Literal

from pydantic import Field

from llmctl.config import Config

Dtype = Literal["float32", "bfloat16"]


class MeshConfig(Config):
    """Devices a mesh axis; -1 takes what is left. One axis at most may be -1."""

    data: int = Field(-1, ge=-1)
    """Replicas of the model that see different examples."""
    fsdp: int = Field(1, ge=-1)
    """Devices that share one copy of the parameters and see different examples."""
    tensor: int = Field(1, ge=-1)
    """Devices that share the heads, the neurons and the vocabulary of each layer."""


class OptimConfig(Config):
    """The optimizer and its learning-rate schedule."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: float = Field(0.05, ge=0)
    """Warm-up steps; below 1 a fraction of all steps."""
    final: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW: decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW: decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW: added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay (L2) on matrices; norms, biases and embeddings are left alone."""
    clip: float = Field(1.0, ge=0)
    """Global gradient norm to clip at; 0 does not clip."""


class TrainConfig(Config):
    """The length of a run, its batches, and what is kept on the way."""

    unkeyed: ClassVar[frozenset[str]] = frozenset(
        {"log_every", "checkpoint_every", "keep", "tensorboard"}
    )

    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=1)
    """Sequences an optimizer step, over all devices."""
    seq_len: int = Field(256, ge=2)
    """Tokens a sequence."""
    accumulate: int = Field(1, ge=1)
    """Microbatches a step; the gradients are those of the whole batch."""
    dtype: Dtype = "float32"
    """Compute type; master weights and optimizer state stay float32."""
    remat: Literal["none", "minimal", "full"] = "none"
    """What the backward pass recomputes: nothing, all but the matmul outputs, everything."""
    eval_every: int = Field(0, ge=0)
    """Steps between validations; 0 validates at the end alone."""
    eval_batches: int = Field(32, ge=1)
    """Batches a validation reads at most."""
    patience: int = Field(0, ge=0)
    """Stop after this many validations without a better metric; 0 never stops early."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints of the training state."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
    log_every: int = Field(10, ge=1)
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events beside the log."""
