"""Describe the compiled functions of a stage, and the arrays that are in memory while a function runs.

A stage is one step of a recipe, such as pretrain or quantize. Each stage creates these descriptions from its config and
abstract arrays, with the same code as a run. `llmctl plan` uses the descriptions to compile the functions for hardware
that is not present.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.sharding import Mesh

from llmctl.config.settings import OptimConfig
from llmctl.model.config import ModelConfig

Tree = Any
"""Tree of abstract arrays: shapes, dtypes and shardings."""


@dataclass(frozen=True)
class Pass:
    """Describe a training step or a forward pass, for the analytic cost model."""

    model: ModelConfig | None = None
    """Config of the network, if it differs from `Program.model`."""
    layers: int = 0
    """Number of layers that run; 0 means the complete model.

    Otherwise, embeddings and head do not run. The layers are those of the decoder or, if there is none, of the encoder.
    """
    optim: OptimConfig | None = None
    """Optimizer of a training step; None means that the pass is a forward pass only."""
    attention: str = "auto"
    """Attention implementation (see `train.attention`); auto uses the platform's kernel."""
    replicated: bool = False
    """Whether every device computes the full program, without sharding."""
    trained: float = 1.0
    """Fraction of the parameters that are trained."""
    beside: float = 0.0
    """FLOPs per step of another model, such as a teacher, summed over all devices."""
    predicted: float = 1.0
    """Fraction of the tokens to which the output projection is applied."""
    written: int = 0
    """Number of decoder tokens per sequence in an encoder-decoder; 0 means as many as encoder tokens."""
    cached: int = 0
    """Number of tokens per sequence in the key-value cache; 0 means that there is no cache."""
    eight: Mapping[str, float] = field(default_factory=dict)
    """Fraction of the layers' matrix products that are computed in 8 bits, by type: int8, float8."""
    statistics: Mapping[str, Tree] = field(default_factory=dict)
    """Calibration statistics: {path of a matrix, such as "mlp/down": statistic of its inputs}. Matrices with the same
    inputs have one entry. The inputs stay in memory until the statistics are updated."""


class Gather(NamedTuple):
    """Describe an all-gather in a program, for the cost model."""

    axes: str
    """Mesh axes of the all-gather, such as "data,fsdp"."""
    sent: float
    """Bytes that each device sends. Each device receives the same number of bytes."""
    payload: float
    """Size of the gathered array in bytes."""


@dataclass(frozen=True)
class Cost:
    """Store the cost of one call of a small program on one device, as computed by formulas."""

    temporaries: float
    """Memory for temporaries and results in bytes, without the arguments."""
    moved: float
    """Bytes read from and written to device memory."""
    flops_by_type: Mapping[str, float] = field(default_factory=dict)
    """FLOPs of matrix products, by type of the operands."""
    gathers: tuple[Gather, ...] = ()


@dataclass(frozen=True)
class Program:
    """Describe a compiled function that a stage runs repeatedly, and the arrays in memory while it runs.

    A stage defines a function `programs`, which returns its programs. `llmctl plan` compiles these programs:

        def programs(config, base, others, mesh):
            step = jax.jit(lambda params: jax.tree.map(lambda a: a / 2, params), donate_argnums=0)
            found = Program("halving", base.model, mesh, lambda: step.trace(base.params), parameters=base.params)
            return [found], base
    """

    title: str
    """Name of the program in tables, such as "train step" or "prefill"."""
    model: ModelConfig
    mesh: Mesh
    trace: Callable[[], Any] = field(repr=False)
    """Function that traces the jitted function with abstract arguments. The result can be lowered for any platform."""
    flops: float = 0.0
    """FLOPs of the model per call of the program, over all devices, as counted by `llmctl.model.flops`."""
    tokens: int = 0
    """Number of tokens that each call of the program processes, over all devices."""
    rows: int = 0
    """Number of sequences per call of the program."""
    seq_len: int = 0
    dtype: str = "float32"
    """Dtype of the computation."""
    remat: str = "none"
    accumulate: int = 1
    steps: int = 0
    """Number of calls of the program in the stage; 0 if unknown."""
    parameters: Tree = ()
    """Shapes, dtypes and shardings of the weights in memory while the program runs."""
    optimizer: Tree = ()
    """Shapes, dtypes and shardings of the optimizer state in memory while the program runs."""
    batch: Tree = ()
    """Shapes, dtypes and shardings of the inputs in memory while the program runs."""
    cache: Tree = ()
    """Shapes, dtypes and shardings of the key-value cache, or of the calibration statistics, in memory while the
    program runs."""
    beside: Tree = ()
    """Abstract arrays in memory that are not arguments of the program. They are also in `parameters`, `optimizer`,
    `batch` or `cache`."""
    artifact_bytes: int = 0
    """Size of the arrays of the artifact that the stage writes, in bytes; 0 if the stage writes no arrays."""
    cache_bytes: int = 0
    """Size of the teachers' outputs that the stage stores, before compression; 0 if the stage stores none."""
    work: Pass | Cost | None = None
    """Input of the analytic cost model, which is used for GPUs instead of compilation. If None, the cost model uses
    `flops`, and takes the size of arguments and results as the memory traffic."""
