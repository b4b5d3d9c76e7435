"""Compute gradients of the task's loss with respect to the matrices of the layers, summed over calibration batches.

One backward pass per batch covers the complete model and recomputes activations (`remat = "full"`). In addition to the
parameters, memory holds:

- one gradient per matrix
- one float32 array per matrix and requested sum
- a float32 copy of every matrix with another dtype

With one backward pass per layer, memory would hold the sums of one layer only. But L layers would take L backward
passes per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.base import Task
from llmctl.model import weights
from llmctl.model.config import ModelConfig

Params = dict[str, Any]
Totals = TypeVar("Totals")

SUMS = {"sum": lambda g: g, "absolute": jnp.abs, "square": jnp.square}
"""Functions of g, the gradient of one batch's total loss. Each function's values are summed over the batches."""

Gradients = dict[str, dict[str, jax.Array]]
"""Sums over batches of g, |g| or g^2: path of a matrix -> name in `SUMS` -> float32 array of the matrix's shape."""


def accumulate(
    task: Task,
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[dict[str, Any]],
    sums: Sequence[str],
    dtype: Any = jnp.float32,
) -> Gradients:
    """Sum g, |g| or g^2 over batches, for the gradient g of the loss with respect to a matrix.

    The matrices of all L layers are stacked: [L, inputs, outputs]. The loss is summed over tokens (or examples), so the
    sum of g does not depend on the batch size. For a quantized matrix, g is the gradient with respect to the
    dequantized values.

    Args:
      task: the task, whose loss is differentiated.
      cfg: config of the model.
      params: parameters of the model.
      batches: training batches, with labels or targets.
      sums: names in `SUMS`, which select the functions of g.
      dtype: dtype of the computation.

    Raises:
      RequestError: If no batch has a label or target.
    """
    step = adder(task, cfg, sums, dtype)
    inner = {m.path: m.node.dense() for m in weights.matrices(params, "block")}
    totals: Gradients = {path: {name: jnp.zeros_like(w) for name in sums} for path, w in inner.items()}
    return summed(step, inner, params, totals, batches)


def summed(
    step: Any, inner: dict[str, jax.Array], params: Params, totals: Totals, batches: Sequence[dict[str, Any]]
) -> Totals:
    """Run `step` on every batch, and return the gradient sums over all batches.

    Args:
      step: compiled function that adds the sums of one batch to `totals`. Its arguments are `inner`, `params`, `totals`
          and the batch. It returns the new totals, and the sum of the tokens' loss weights.
      inner: the arrays with respect to which `step` differentiates, by path.
      params: parameters of the model.
      totals: initial sums, which are donated.
      batches: training batches, with labels or targets.

    Raises:
      RequestError: If no batch has a label or target.
    """
    weight = 0.0
    for batch in batches:
        totals, more = step(inner, params, totals, batch)
        weight += float(more)
    if not weight:
        raise RequestError("calibration has no labels or targets: the loss has no gradient")
    return totals


def adder(task: Task, cfg: ModelConfig, sums: Sequence[str], dtype: Any) -> Any:
    """Return a compiled function that adds the gradient sums of one batch to the totals.

    Its arguments are the matrices, the parameters, the totals and the batch. It computes the gradients, and applies
    each function that `sums` names. It returns the new totals, and the sum of the tokens' loss weights. The old totals
    are donated.
    """
    loss = task.loss_of(cfg, dtype=dtype, remat="full")

    def total(inner: dict[str, jax.Array], params: Params, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        value, found = loss(weights.updated(params, inner), batch)
        return value, found["weight"]

    @partial(jax.jit, donate_argnums=2)
    def step(inner: dict[str, jax.Array], params: Params, totals: Gradients, batch: dict[str, Any]) -> Any:
        grads, weight = jax.grad(total, has_aux=True)(inner, params, batch)
        return {p: {n: totals[p][n] + SUMS[n](g) for n in sums} for p, g in grads.items()}, weight

    return step


def of_layer(gradients: Gradients, stack: str, index: int) -> Gradients:
    """Return the gradient sums of one layer: path of the matrix ("attn/q") -> name of the sum -> array [I, O]."""
    named = [(weights.parse(path), sums) for path, sums in gradients.items()]
    return {
        name.module: {moment: a[index] for moment, a in sums.items()} for name, sums in named if name.stack == stack
    }
