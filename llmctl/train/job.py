"""Describe one training run: parameters, loss, training rows, validation, and the arrays that are trained.

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

NEVER = 2**31 - 1
"""Number of updates that stands for "never". `Job.starts` returns this number for arrays or layers that stay frozen."""
EXTRA = "extra/"
"""Prefix of names in the training state: trained arrays outside the model (`Job.extra`) have this prefix."""


@dataclass(frozen=True)
class Job:
    """Describe one training run: initial parameters, loss, training rows, validation, and which arrays are trained."""

    params: Params
    """Initial parameters, sharded over the mesh. Trained arrays are donated to the training state. Abstract arrays
    suffice for compiling."""
    loss: Callable[..., tuple[jax.Array, Sums]]
    """Loss function. Its arguments are the parameters, the batch, the dropout key, and the elements of `constants`. It
    returns (sum of losses, metric sums). The step divides the sum of losses by the metric sum "weight". If the job has
    `extra` arrays, the loss also gets these arrays as the keyword argument `extra`.
    """
    rows: Any
    """Training rows (token sequences with their labels), with random access by row number."""
    validate: Callable[[Params], dict[str, float]]
    """Function that computes the metrics of parameters on the validation data, by name."""
    constants: tuple[Any, ...] = ()
    """Arrays that the loss reads as its last arguments and that no step changes, such as the parameters of a
    teacher."""
    metric: str = "loss"
    """Validation metric that selects the best parameters. Its entry in `llmctl.evaluate.metrics.base.METRICS` defines
    whether higher or lower values are better.
    """
    keep_best: bool = False
    """Whether training returns the parameters with the best validation metric. Otherwise training returns the last
    parameters."""
    trains: Callable[[str], bool] = lambda _: True
    """Predicate on the names of the arrays in `params`: True for arrays that are trained."""
    rate: Callable[[str], Any] = lambda _: 1.0
    """Function from the name of a trained array to the factor by which its learning rate is multiplied. The factor is a
    number or, for an array of stacked layers [L, ...], one factor per layer [L, 1, ...]."""
    starts: Callable[[str], Any] = lambda _: 0
    """Function from the name of a trained array to the number of updates after which its training starts. The result is
    a number, or for stacked layers one number per layer [L, 1, ...]. Before this update, the array and its optimizer
    state do not change. `NEVER` freezes the array in all steps.
    """
    frozen_layers: int = 0
    """Number of frozen layers in the encoder, and also in the decoder, counted from the first layer. If this number is
    above 0, the embeddings are frozen too."""
    holds_zeros: Callable[[str], bool] = lambda _: False
    """Predicate on array names: True for arrays whose zeros stay zero, such as pruned matrices."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Trained arrays that are not part of the model, by name. Examples are projections for the distillation of hidden
    states, and a network that computes a trained prefix. These arrays keep their sharding and are trained in float32.
    The optimizer state, the moving average and the checkpoints include these arrays.
    """
    result: Callable[[Params, Params], Params] = lambda params, extra: params
    """Function that computes the parameters that are validated and returned. Its arguments are `params` and `extra`,
    the trained arrays outside the model. By default the function returns `params`.
    """
    trains_result: bool = False
    """Whether the loss reads the parameters that the function `result` returns. If true, the arrays in `extra` are
    trained through these parameters, and the loss does not get the argument `extra`.
    """
    after_step: Callable[[State, jax.Array], State] | None = None
    """Function that updates the state after the optimizer, as part of the compiled step. Its arguments are the state
    and the step. It returns the new state. Examples are a pruning schedule and a rank budget.
    `llmctl.train.training_state` describes the state (a dictionary). For this function, the state has three more
    entries, which the function only reads: "gradients" (clipped, and zero for weights held at zero), "dense_gradients"
    (clipped, for all weights), and "before" (the trained arrays before the step). `step` counts from 1. The function
    must be pure, and must keep structure, shapes and dtypes. If a step is skipped, the result is discarded.
    """
    memory: Callable[[Params], Any] | None = None
    """Function from the trained arrays to a tree of further arrays that are kept between steps. The tree is the entry
    "memory" of the training state. The function `after_step` reads and updates the tree. None means no such entry."""
    state_metrics: Callable[[State], Sums] | None = None
    """Function from the state after a step to further metrics of the step that are logged, such as the sparsity."""
    reads_memory: bool = False
    """Whether the loss reads the arrays that `memory` keeps between steps. If true, the loss gets these arrays as the
    keyword argument `memory`.
    """
    penalty: Callable[[Params], jax.Array] | None = None
    """Function from the parameters to a scalar. Every step adds the scalar to the mean loss before the loss is
    differentiated. The logged loss does not include this scalar."""
    prepare: Callable[[Params, Batch, int], Batch] | None = None
    """Function that is called before each step, and returns the batch to train on. Its arguments are the current
    arrays by name, the batch, and the number of finished steps. The function must keep shapes, dtypes and shardings.
    For example, on-policy distillation replaces completions by samples of the student."""
    best_from: int = 0
    """First step whose parameters can be selected as the best. Validations before this step select nothing."""
    flops: float = 0.0
    """Floating-point operations per token, used to report the model FLOPs utilization (MFU). 0 reports no MFU."""
    model: ModelConfig | None = None
    """Config of the model, if the job has one. The log then reports the attention kernel of the model."""


def split(job: Job) -> tuple[Params, Params]:
    """Return (trained arrays, other arrays) by name. The trained arrays include arrays that are not part of the
    model."""
    named = weights.arrays(job.params)
    trained = {n: a for n, a in named.items() if job.trains(n)}
    trained |= {f"{EXTRA}{n}": a for n, a in job.extra.items()}
    return trained, {n: a for n, a in named.items() if n not in trained}


def joined(job: Job, named: Params) -> Params:
    """Return the model's parameters to validate and to save, as a tree.

    Args:
      job: the training job.
      named: all arrays of the job, by name.
    """
    extra = {n: named[f"{EXTRA}{n}"] for n in job.extra}
    return job.result(weights.rebuild(job.params, named), extra)
