"""Attribute an output to token embeddings: gradient times input, and integrated gradients.

Integrated gradients (Sundararajan et al., 2017, arXiv:1703.01365) integrate the gradient along the straight line from a
baseline to the embeddings. The attributions of a text sum to the difference between the outputs at the text and at the
baseline (completeness). Attributions are to embeddings, so weights may be quantized, sparse or adapted.

The line is divided into intervals with Gauss-Legendre nodes. Completeness holds for each interval, too: the integral
over an interval is the difference between the outputs at its ends. Intervals with a large error are halved until the
sum of the absolute errors is small. Errors of different intervals therefore cannot cancel.

Shapes: N rows, R rows per call, T tokens per row, D model width, G nodes per interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import WorkError
from llmctl.evaluate.attribution import inputs
from llmctl.evaluate.attribution.outputs import outputs
from llmctl.model import functional, weights
from llmctl.model.transformer import Batch, Params

NODES = 6
"""Number of gradients per interval, G."""
SMALLEST = 1e-3
"""Minimum denominator of the completeness error, as a fraction of the larger of the two outputs. Smaller differences
between the outputs are mostly float32 rounding."""

Evaluate = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Function that evaluates M points. Its arguments are the row index of each point [M], and the position of each point
on the row's line, from 0 to 1 [M]. It returns the outputs [M], and the products of gradient and direction [M, T]."""


@dataclass(frozen=True)
class Attribution:
    """Store the attributions of one row, and how complete they are."""

    values_T: np.ndarray
    output: float
    """Output of the model for the text."""
    baseline: float
    """Output of the model if the embeddings of the text are replaced by the baseline."""
    steps: int
    """Number of gradients that were computed."""

    @property
    def difference(self) -> float:
        """Return the output for the text minus the output at the baseline."""
        return self.output - self.baseline

    @property
    def error(self) -> float:
        """Return the completeness error: |sum of attributions - difference| / |difference|."""
        return abs(float(self.values_T.sum()) - self.difference) / scale(self.output, self.baseline)


def scale(output: float, baseline: float) -> float:
    """Return the denominator of the completeness error: |output - baseline|.

    The denominator is at least `SMALLEST` times the larger magnitude of output and baseline.
    """
    return max(abs(output - baseline), SMALLEST * max(abs(output), abs(baseline)), 1e-12)


def program(found: Artifact, baseline: int | None, dtype: str) -> Any:
    """Return a compiled function that computes outputs [R] and products [R, T].

    Its arguments are the parameters and a batch.

    The embeddings are baseline + alpha * (embeddings - baseline) for tokens with `explained` = 1. Other tokens keep
    their embeddings, as do positions and segment types. A product is the gradient of a row's output at these
    embeddings, times (embeddings - baseline), summed over the model width.

    Args:
        found: The artifact; only its config and task are used.
        baseline: Id of the token whose embedding is the baseline; None for zeros.
        dtype: Dtype of the computation.
    """
    cfg, prefix = found.model, inputs.side(found.model)

    @jax.jit
    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        here_RT = batch["explained"] > 0
        table = params["embed"]["tokens"]

        def embedded(ids: jax.Array) -> jax.Array:
            return weights.take(table, ids, jnp.float32, ("vocab_in", "embed_in"))

        # Ids of a trained prompt are not in the table. These tokens keep their embeddings.
        e_RTD = embedded(jnp.where(here_RT, batch[f"{prefix}tokens"], 0))
        start = 0.0 if baseline is None else embedded(jnp.full((1, 1), baseline))
        direction_RTD = jnp.where(here_RT[..., None], e_RTD - start, 0.0)

        def at(offset_RTD: jax.Array) -> jax.Array:
            moved = batch | {f"{prefix}embedding_offset": offset_RTD}
            return outputs(found, params, functional.hidden(cfg, params, moved, dtype=dtype), batch, dtype)

        y_R, pull = jax.vjp(at, (batch["alpha"] - 1)[:, None, None] * direction_RTD)
        (gradient_RTD,) = pull(jnp.ones_like(y_R))
        return y_R, jnp.sum(gradient_RTD * direction_RTD, axis=-1)

    return step


def gradient_input(evaluate: Evaluate, count: int) -> list[Attribution]:
    """Return the attributions of `count` rows by gradient times input.

    The factor is (embeddings - baseline), which is the input if the baseline is zero.
    """
    rows_N = np.arange(count)
    y_N, dot_NT = evaluate(rows_N, np.ones(count))
    base_N, _ = evaluate(rows_N, np.zeros(count))
    _check(y_N, dot_NT)
    return [Attribution(dot_NT[n], float(y_N[n]), float(base_N[n]), 1) for n in rows_N]


class _Line:
    """Integrate the gradients of one row along the line from the baseline to the text.

    The line is divided into intervals. Their ends, outputs and errors are stored.
    """

    def __init__(self, width: int) -> None:
        self.y: dict[float, float] = {}
        self.integral: dict[tuple[float, float], np.ndarray] = {}
        self.pending = [(0.0, 0.5), (0.5, 1.0)]
        self.steps, self._width = 0, width

    def points(self) -> list[float]:
        """Return the points of the line to evaluate: ends without a known output, and all nodes of the pending
        intervals."""
        ends = dict.fromkeys(end for pair in self.pending for end in pair if end not in self.y)
        return [*ends, *(float(a + (b - a) * t) for a, b in self.pending for t in _T)]

    def add(self, y_M: np.ndarray, dot_MT: np.ndarray) -> None:
        """Store the outputs [M] and the products of gradient and direction [M, T] at the points of `points`."""
        points = self.points()
        known = len(points) - NODES * len(self.pending)
        self.y |= {point: float(y) for point, y in zip(points[:known], y_M[:known], strict=True)}
        for (a, b), dot_GT in zip(self.pending, dot_MT[known:].reshape(-1, NODES, self._width), strict=True):
            self.integral[a, b] = (b - a) * np.einsum("g,gt->t", _W, dot_GT.astype(np.float64))
        self.steps += NODES * len(self.pending)
        self.pending = []

    def refine(self, tolerance: float, most: int) -> None:
        """Halve the intervals with large errors, if the sum of absolute errors is too large and steps are left."""
        error = {(a, b): abs(float(v.sum()) - (self.y[b] - self.y[a])) for (a, b), v in self.integral.items()}
        if sum(error.values()) <= tolerance * scale(self.y[1.0], self.y[0.0]):
            return
        worst = sorted(error, key=lambda pair: -error[pair])
        large = [pair for pair in worst if error[pair] >= error[worst[0]] / 4]
        for a, b in large[: max(most - self.steps, 0) // (2 * NODES)]:
            del self.integral[a, b]
            self.pending += [(a, (a + b) / 2), ((a + b) / 2, b)]

    def result(self) -> Attribution:
        return Attribution(np.sum([*self.integral.values()], axis=0), self.y[1.0], self.y[0.0], self.steps)


_X, _W2 = np.polynomial.legendre.leggauss(NODES)
_T, _W = (_X + 1) / 2, _W2 / 2


def integrated(evaluate: Evaluate, count: int, width: int, tolerance: float, most: int) -> list[Attribution]:
    """Return the attributions of `count` rows by integrated gradients.

    Args:
        evaluate: Function that computes outputs and products (see `Evaluate`).
        count: Number of rows, N.
        width: Number of tokens per row, T.
        tolerance: Largest sum of absolute errors, relative to the difference of the outputs.
        most: Maximum number of gradients per row. If it is reached, the error may exceed the tolerance.

    Raises:
        WorkError: If an output or a gradient is not finite.
    """
    lines = [_Line(width) for _ in range(count)]
    while waiting := [n for n in range(count) if lines[n].pending]:
        points = [(n, at) for n in waiting for at in lines[n].points()]
        y_M, dot_MT = evaluate(np.array([n for n, _ in points]), np.array([at for _, at in points]))
        _check(y_M, dot_MT)
        first = 0
        for n in waiting:
            here = slice(first, first + len(lines[n].points()))
            lines[n].add(y_M[here], dot_MT[here])
            lines[n].refine(tolerance, most)
            first = here.stop
    return [line.result() for line in lines]


def _check(y_M: np.ndarray, dot_MT: np.ndarray) -> None:
    if not (np.isfinite(y_M).all() and np.isfinite(dot_MT).all()):
        raise WorkError("explain: the model gives an output or a gradient that is not finite; check its weights")
