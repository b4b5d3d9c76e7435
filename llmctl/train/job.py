"""Describe what a training run computes: parameters, loss, rows, validation, and what stays fixed.

Example:
  >>> import jax.numpy as jnp
  >>> job = Job({"w": jnp.ones(3), "b": jnp.zeros(3)}, loss=None, rows=None, validate=None, trains=lambda n: n == "w")
  >>> [sorted(part) for part in split(job)]
  [['w'], ['b']]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from llmctl.model import weights
from llmctl.model.config import ModelConfig

Params = dict[str, Any]
Batch = dict[str, Any]
State = dict[str, Any]
Sums = dict[str, jax.Array]

EXTRA = "extra/"
"""Prefix of the names of extra parameters in the training state."""


@dataclass(frozen=True)
class Job:
    """Training job of a stage: initial parameters, loss, rows, validation, and what is trained."""

    params: Params
    """Initial parameters, sharded over the mesh. Trained arrays are donated to the training state; abstract arrays
    suffice for compiling."""
    loss: Callable[..., tuple[jax.Array, Sums]]
    """(params, batch, dropout key, *constants) -> (sum of losses, sums with "weight"). The step divides by the weight.
    If the job has extra parameters, the loss also receives them as the keyword argument `extra`."""
    rows: Any
    """Random-access training rows."""
    validate: Callable[[Params], dict[str, float]]
    """Metrics of parameters on held-out data."""
    constants: tuple[Any, ...] = ()
    """Further arrays that the loss reads, such as a teacher's parameters."""
    metric: str = "loss"
    """Validation metric that selects the best parameters; its record in `METRICS` has the direction."""
    keep_best: bool = False
    """Return the parameters with the best validation metric instead of the last ones."""
    trains: Callable[[str], bool] = lambda _: True
    """Return whether an array of `params` is trained, by name."""
    rate: Callable[[str], float] = lambda _: 1.0
    """Return the factor on the learning rate of a trained array, by name."""
    frozen_layers: int = 0
    """Number of layers, from the first, that are not trained. If above 0, the embeddings are not trained either."""
    holds_zeros: Callable[[str], bool] = lambda _: False
    """Return whether zeros of an array stay zero, by name (pruned matrices)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Trained arrays beside the model, by name: projections for the distillation of hidden states, prompt vectors. They
    are sharded as given, float32 while they train, and have optimizer state, moving average and checkpoints."""
    result: Callable[[Params, Params], Params] = lambda params, extra: params
    """(params, extra) -> the parameters that are validated and returned. The default drops the extra ones."""
    after_step: Callable[[State, jax.Array], State] | None = None
    """Pure function (state, step) -> state, part of the compiled step and applied after the optimizer: pruning masks
    with a schedule, rank budgets. `state` has "params" (by name, extra ones as "extra/NAME"), "optimizer", and "ema",
    "usual" and "memory" if configured. It also has "gradients" (by name, clipped), which the function only reads.
    `step` counts from 1. Structure, shapes and dtypes must stay. A skipped step discards the result."""
    memory: Callable[[Params], Any] | None = None
    """(trained arrays by name) -> what `after_step` keeps between steps, a tree of arrays in the state's "memory"."""
    penalty: Callable[[Params], jax.Array] | None = None
    """(params) -> scalar that is added to the mean loss in every step; the logged loss omits it."""
    best_from: int = 0
    """First step whose parameters can be the best; earlier validations choose nothing."""
    flops: float = 0.0
    """Floating-point operations per token, for the utilization (MFU); 0 reports none."""
    model: ModelConfig | None = None
    """The network, if the job has one; the log then reports its attention kernel."""


def split(job: Job) -> tuple[Params, Params]:
    """Return the trained arrays, extra ones included, and the arrays that are not trained, by name."""
    named = weights.arrays(job.params)
    trained = {n: a for n, a in named.items() if job.trains(n)}
    trained |= {f"{EXTRA}{n}": a for n, a in job.extra.items()}
    return trained, {n: a for n, a in named.items() if n not in trained}


def joined(job: Job, named: Params) -> Params:
    """Return the parameters to validate and to save, from all arrays of the job by name."""
    extra = {n: named[f"{EXTRA}{n}"] for n in job.extra}
    return job.result(weights.rebuild(job.params, named), extra)
