"""Describe a training step or a forward pass by its sizes.

The analytic model estimates memory and work from this description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.model.config import ModelConfig

ITEM = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Setup:
    """Describe a training step or a forward pass, so that its memory and work can be estimated."""

    model: ModelConfig
    mesh: Mapping[str, int]
    """Size of each mesh axis. A missing axis has size 1."""
    rows: int
    """Number of sequences per step, over all devices and microbatches."""
    seq_len: int
    """Number of tokens per sequence; in an encoder-decoder, per sequence of the encoder."""
    dtype: str = "bfloat16"
    """Dtype of matrix products and activations."""
    remat: str = "none"
    accumulate: int = 1
    optimizer: str = ""
    """Name of the optimizer; empty for a forward pass."""
    ema: bool = False
    trained: float = 1.0
    """Fraction of the parameters that are trained. For LoRA, this is the number of adapter parameters divided by the
    number of model parameters."""
    stored: float = 0.0
    """Bytes of arrays outside the training state, per parameter of the model. Such arrays are frozen weights or a
    teacher."""
    fused: bool = True
    """Whether attention runs in a fused kernel, which stores no attention scores."""
    eight: Mapping[str, float] = field(default_factory=dict)
    """Fraction of the layers' matrix products that are computed in 8 bits, by dtype (int8, float8)."""
    beside: float = 0.0
    """FLOPs of another model that runs in the same step, such as a teacher. The FLOPs are summed over all devices."""
    cached: int = 0
    """Number of tokens per sequence in the key/value cache."""
    predicted: float = 1.0
    """Fraction of the tokens for which the output projection is computed."""
    written: int = 0
    """Number of decoder tokens per sequence in an encoder-decoder; 0 if this number equals `seq_len`."""
    hessians: bool = False
    """Whether calibration stores Hessians: the Gram matrix [I, I] of the inputs of each matrix, for one layer at a
    time."""

    def size(self, *axes: str) -> int:
        """Return the product of the sizes of the mesh axes `axes`."""
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    @property
    def item_bytes(self) -> int:
        """Return the number of bytes per element of an activation."""
        return ITEM[self.dtype]

    @property
    def own_rows(self) -> float:
        """Return the number of sequences per device and microbatch."""
        return self.rows / self.accumulate / self.size("data", "fsdp")

    @property
    def last_tokens(self) -> float:
        """Return the number of tokens per device and microbatch that the last layer reads.

        In an encoder-decoder, this layer is in the decoder.
        """
        return self.own_rows * (self.written or self.seq_len) / self.size("context")

    @property
    def tokens(self) -> float:
        """Return the number of tokens per device and microbatch that a layer reads, averaged over all layers."""
        first, layers = self.model.encoder_layers, self.model.layers
        read = self.own_rows * self.seq_len / self.size("context")
        return (first * read + layers * self.last_tokens) / (first + layers) if self.written else read

    @property
    def depth(self) -> float:
        """Return the number of layers on each device, summed over the encoder and the decoder."""
        return (self.model.layers + self.model.encoder_layers) / self.size("pipeline")


def of_training(model: ModelConfig, train: TrainConfig, optim: OptimConfig, mesh: Mapping[str, int]) -> Setup:
    """Return the setup of a training step in which all parameters are trained."""
    return Setup(
        model=model, mesh=mesh, rows=train.batch_size, seq_len=train.seq_len, dtype=train.dtype, remat=train.remat,
        accumulate=train.accumulate, optimizer=optim.name, ema=bool(optim.ema),
        fused=has_kernel(model, train.attention, mesh),
    )  # fmt: skip


def has_kernel(model: ModelConfig, attention: str, mesh: Mapping[str, int]) -> bool:
    """Return whether the platform's attention kernel supports this model, mesh and value of the setting `attention`."""
    return attention == "auto" and model.positions != "relative" and mesh.get("context", 1) == 1
