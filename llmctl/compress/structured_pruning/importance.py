"""Compute the importance by which structured pruning selects attention heads and neurons.

Each importance is one function of a sublayer's matrices and of calibration statistics:

- contribution: norm of the head's or neuron's contribution to the residual stream
- activation: sum over tokens of the norm of the head's output or of the neuron's output (Minitron: Muralidharan et al.,
  2024, arXiv:2407.14679)
- taylor: change of the loss, to first order, if the output is removed (Molchanov et al., 2019, arXiv:1906.10771)
- magnitude: norm of the weights that compute the unit's output, and of the weights that multiply this output
- random: random numbers, a baseline

Shapes: L layers, N heads or neurons (the units), K width of a unit, I = N * K outputs of all units, D model width.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.compress.calibration.statistics import Gram, Joined, Moments, Norms, Statistic, Totals
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.model import wiring
from llmctl.model.weights import dense

SCORE, GRAM, TOTALS = "score", "gram", "totals"
"""Names of the statistics in a `Joined`: SCORE for the importance, GRAM and TOTALS for repair."""


def statistic(method: StructuredMethod, inputs: int, units: int) -> Statistic | None:
    """Return an empty statistic for a matrix's inputs; None if the method needs no statistic.

    Args:
      method: the method.
      inputs: number of inputs of the matrix.
      units: number of heads or neurons that produce the inputs.
    """
    parts: dict[str, Statistic] = {}
    if method.importance == "contribution":
        parts[SCORE] = Moments.start(inputs) if units == inputs else Gram.start(inputs, units)
    if method.importance == "activation":
        parts[SCORE] = Norms.start(inputs, units)
    if method.repair:
        parts |= {GRAM: Gram.start(inputs), TOTALS: Totals.start(inputs)}
    return Joined(parts) if parts else None


def of_units(
    method: StructuredMethod,
    units: wiring.Units,
    layer: dict[str, Any],
    measured: Joined | None,
    gates_N: np.ndarray | None,
    at: tuple[str, int],
) -> np.ndarray:
    """Return the importance [N] of the heads or neurons of one sublayer.

    Args:
      method: the method.
      units: description of the heads or neurons.
      layer: parameters of the layer.
      measured: statistic of the units' outputs, which are the inputs of a matrix; None if the method needs no
          statistic.
      gates_N: derivatives of the loss with respect to a factor on each unit, for "taylor"
          (`llmctl.compress.structured_pruning.gates`).
      at: (stack, index of the layer).
    """
    if method.importance == "random":
        seed = [method.seed, zlib.crc32(f"{at[0]}/{at[1]}/{units.name}".encode())]
        return np.random.default_rng(seed).random(units.count, np.float32)
    if method.importance == "taylor":
        return np.asarray(gates_N)
    if method.importance == "magnitude":
        return np.sqrt(sum(np.asarray(square) for square in _squares(units, layer)))
    stat: Any = measured.parts[SCORE] if measured else None
    if method.importance == "activation":
        return np.asarray(stat.sums)
    kernel = dense(_kernel(layer, units.readers[0]))
    return np.asarray(head_scores(stat, kernel) if isinstance(stat, Gram) else neuron_scores(stat, kernel))


def head_scores(gram: Gram, o: jax.Array) -> jax.Array:
    """Return the norm ||X_h O_h||_F of each query head's contribution to the residual stream, [N].

    X_h are the outputs of head h. O_h are the rows of the matrix `o` [I, D] that multiply them.
    """
    heads, width, _ = gram.products.shape
    o_NKD = o.astype(jnp.float32).reshape(heads, width, -1)
    square_N = jnp.einsum("hkl,hkd,hld->h", gram.products, o_NKD, o_NKD)
    return jnp.sqrt(jnp.maximum(square_N, 0.0))


def neuron_scores(stats: Moments, down: jax.Array) -> jax.Array:
    """Return the norm ||x_n||_2 * ||down_n||_2 of each neuron's contribution to the residual stream, [N].

    x_n are the outputs of neuron n, and down_n is row n of the matrix `down` [N, D].
    """
    return jnp.sqrt(stats.squares) * jnp.linalg.norm(down.astype(jnp.float32), axis=1)


def _squares(units: wiring.Units, layer: dict[str, Any]) -> list[jax.Array]:
    """Return the sum of squares of each head's or neuron's weights, as one array [N] per matrix.

    First come the matrices that compute the outputs of the units, then the matrices that read these outputs.
    """

    def of(path: str, axis: int) -> jax.Array:
        square = jnp.sum(jnp.square(dense(_kernel(layer, path))), axis=axis)
        return square.reshape(units.count, -1).sum(axis=1)

    return [*(of(path, 0) for path in units.writers), *(of(path, 1) for path in units.readers)]


def _kernel(layer: dict[str, Any], path: str) -> Any:
    part, name = path.split("/")
    return layer[part][name]["kernel"]
