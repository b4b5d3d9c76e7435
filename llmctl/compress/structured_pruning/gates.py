"""Compute derivatives of the loss with respect to gates: factors on the outputs of heads, neurons and hidden channels.

Each unit (head, neuron or channel) has one gate. The derivative with respect to the gate, at the value 1, is the sum of
w * g. Here w are the weights that multiply the unit's output. Their gradients are g. The absolute value of the
derivative is the change of the loss, to first order, if the unit is removed (Molchanov et al., 2019, arXiv:1906.10771).
The gate of a hidden channel multiplies one channel of a norm's output.

Gradients are computed only for norms, and for matrices that read the outputs of units. Between batches, memory holds
only the sum of each unit's derivatives.

Shapes: L layers, N units, I inputs, O outputs, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.compress.calibration.gradients import summed
from llmctl.compress.calibration.measurements import Arrays, Measurements
from llmctl.distributed import host_arrays
from llmctl.evaluate.tasks.base import Task
from llmctl.model import weights
from llmctl.model.config import ModelConfig

Params = dict[str, Any]

Gates = dict[str, np.ndarray]
"""Sums over batches of the absolute derivatives [..., N], by the path of the matrix or of the norm's scale."""


def accumulate(
    task: Task,
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[dict[str, Any]],
    units: Mapping[str, int],
    dtype: Any = jnp.float32,
    *,
    saved: Measurements = Measurements(None),
    name: str = "gates",
) -> Gates:
    """Return the absolute derivatives of a batch's total loss with respect to the gates, summed over batches.

    Args:
      task: the task, whose loss is differentiated.
      cfg: config of the model.
      params: parameters of the model.
      batches: training batches, with labels or targets.
      units: {path: number of units}. Heads and neurons have the path of the matrix that reads their outputs
          ("decoder/blocks/attn/o/kernel"). Channels have the path of a norm's scale.
      dtype: dtype of the computation.
      saved: sums of an interrupted run.
      name: name of the sums in `saved`.

    Raises:
      RequestError: If no batch has a label or target.
    """

    def measured() -> Arrays:
        step, inner = adder(task, cfg, units, dtype), read(params, units)
        totals = {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes(params, units).items()}
        return {p: host_arrays.read(a) for p, a in summed(step, inner, params, totals, batches).items()}

    return saved.get(name, measured)


def read(params: Params, units: Mapping[str, int]) -> dict[str, jax.Array]:
    """Return the dense weights whose gradients are needed: the matrices and norms in `units`, and biases of norms."""
    flat = weights.flatten(params)
    biases = [bias for path in units if (bias := _bias_of(path)) in flat]
    return {path: weights.dense(flat[path]) for path in [*units, *biases]}


def shapes(params: Params, units: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return {path: shape of the sum of derivatives}: [layers, units], or [units] for a norm outside of the layers."""
    flat = weights.flatten(params)
    return {
        path: (*weights.as_node(flat[path]).shape[: -1 if path.endswith("/scale") else -2], n)
        for path, n in units.items()
    }


def adder(task: Task, cfg: ModelConfig, units: Mapping[str, int], dtype: Any) -> Any:
    """Return a compiled function that computes absolute derivatives for one batch, and adds them to the totals.

    The derivatives are those of the loss with respect to the gates.

    Its arguments are the dense weights (see `read`), the parameters, the totals and the batch. It returns the new
    totals, and the sum of the tokens' loss weights. The old totals are donated.
    """
    loss = task.loss_of(cfg, dtype=dtype, remat="full")

    def total(inner: dict[str, jax.Array], params: Params, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        value, found = loss(weights.updated(params, inner), batch)
        return value, found["weight"]

    def gate(path: str, inner: dict[str, jax.Array], grads: dict[str, jax.Array]) -> jax.Array:
        if not path.endswith("/scale"):
            product = inner[path] * grads[path]
            return jnp.sum(product.reshape(*product.shape[:-2], units[path], -1), axis=-1)
        found = (inner[path] + cfg.norm_plus_one) * grads[path]
        bias = _bias_of(path)
        return found + inner[bias] * grads[bias] if bias in inner else found

    @partial(jax.jit, donate_argnums=2)
    def step(inner: dict[str, jax.Array], params: Params, totals: dict[str, jax.Array], batch: dict[str, Any]) -> Any:
        grads, weight = jax.grad(total, has_aux=True)(inner, params, batch)
        return {path: a + jnp.abs(gate(path, inner, grads)) for path, a in totals.items()}, weight

    return step


def _bias_of(path: str) -> str:
    """Return the path of a norm's bias, given the path of the norm's scale; empty for a matrix."""
    return path.removesuffix("scale") + "bias" if path.endswith("/scale") else ""
