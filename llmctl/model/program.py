"""Describe the compiled functions that a stage runs: their computation, and the arrays in memory meanwhile.

A stage builds these records from its config and from abstract arrays, through the code that its run uses. `llmctl plan`
compiles them for hardware that is not attached. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.sharding import Mesh

from llmctl.config.settings import OptimConfig
from llmctl.model.config import ModelConfig

Tree = Any
"""A tree of abstract arrays with shardings."""


@dataclass(frozen=True)
class Pass:
    """A pass through the layers of a model, in the terms of the analytic cost model."""

    model: ModelConfig | None = None
    """The network, if it is not the program's."""
    layers: int = 0
    """Number of layers of the stack that runs last, without embeddings and head; 0 is the whole model."""
    optim: OptimConfig | None = None
    """Optimizer of a training step; None is a forward pass."""
    attention: str = "auto"
    """As `train.attention`: auto takes the platform's kernel."""
    replicated: bool = False
    """Whether every device computes the full program."""
    trained: float = 1.0
    """Fraction of the parameters that is trained."""
    beside: float = 0.0
    """Operations of a step, over all devices, of another model that runs beside it (a teacher)."""
    predicted: float = 1.0
    """Fraction of the tokens that the output projection reads."""
    written: int = 0
    """Tokens per sequence of a decoder beside an encoder, if they differ from the encoder's."""
    cached: int = 0
    """Tokens per sequence in the cache of keys and values."""
    eight: Mapping[str, float] = field(default_factory=dict)
    """Fraction of the layers' matrix products that is in 8 bits, by type: int8, float8."""
    statistics: Mapping[str, Tree] = field(default_factory=dict)
    """Calibration statistics by matrix ("mlp/down"), whose inputs are kept until they are folded in."""


class Gather(NamedTuple):
    """An all-gather of a program."""

    axes: str
    """The mesh axes, as "data,fsdp"."""
    sent: float
    """Bytes that a device receives."""
    payload: float
    """Bytes of the gathered array."""


@dataclass(frozen=True)
class Cost:
    """Cost of a program that is smaller than a pass through a layer: of one device, by arithmetic."""

    temporaries: float
    """Bytes in memory beside the arguments, results included."""
    moved: float
    """Bytes read from and written to memory."""
    flops_by_type: Mapping[str, float] = field(default_factory=dict)
    """Operations of matrix products by type of the operands."""
    gathers: tuple[Gather, ...] = ()


@dataclass(frozen=True)
class Program:
    """One compiled function that a stage runs repeatedly, and the arrays in memory while it runs.

    A stage exports its programs, so that `llmctl plan` can compile them:

        def programs(config, base, others, mesh):
            step = jax.jit(lambda params: jax.tree.map(lambda a: a / 2, params), donate_argnums=0)
            found = Program("halving", base.model, mesh, lambda: step.trace(base.params), parameters=base.params)
            return [found], base
    """

    title: str
    """Name of the program in tables: train step, prefill, ..."""
    model: ModelConfig
    mesh: Mesh
    trace: Callable[[], Any] = field(repr=False)
    """Trace the jitted function with abstract arguments; the result can be lowered for any platform."""
    flops: float = 0.0
    """Operations of the model per run, on all devices, as `llmctl.model.flops` counts them."""
    tokens: int = 0
    """Tokens that a run reads or writes, on all devices."""
    rows: int = 0
    """Sequences per run."""
    seq_len: int = 0
    dtype: str = "float32"
    """Compute type."""
    remat: str = "none"
    accumulate: int = 1
    steps: int = 0
    """Number of runs in the stage; 0 if unknown."""
    parameters: Tree = ()
    """Arrays in memory while it runs, by class: weights,"""
    optimizer: Tree = ()
    """optimizer state,"""
    batch: Tree = ()
    """inputs,"""
    cache: Tree = ()
    """keys and values or statistics."""
    beside: Tree = ()
    """Those of the arrays above that are not arguments of the program."""
    work: Pass | Cost | None = None
    """Assumptions of the analytic model on platforms whose compiler is not used (GPUs).

    None counts `flops`, and the arguments and results as memory traffic."""
