"""Unstructured and N:M pruning: a method is one score function, a pattern says which scores compete with one another.

The zeros are the mask: nothing else is stored, and training a sparse artifact holds `w != 0`.
A new method is one function `(w_IO, stats) -> score_IO` and a row in METHODS.

Shapes: I inputs, O outputs of one layer's matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llmctl.compress.calibrate import Moments
from llmctl.compress.pattern import Pattern
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import Weight

Score = Callable[[jax.Array, Moments | None], jax.Array]


def magnitude(w_IO: jax.Array, stats: Moments | None) -> jax.Array:
    """|W|; needs no data."""
    return jnp.abs(w_IO)


def wanda(w_IO: jax.Array, stats: Moments | None) -> jax.Array:
    """|W_ij| * ||X_i||_2, the size of what the weight adds to its output on the calibration data (arXiv:2306.11695)."""
    assert stats is not None, "wanda needs calibration statistics"
    return jnp.abs(w_IO) * jnp.sqrt(stats.squares)[:, None]


@dataclass(frozen=True)
class Method:
    """A score, and among which weights it is compared when the pattern is unstructured."""

    score: Score
    per: Literal["matrix", "output"]
    calibrated: bool


METHODS = {
    "magnitude": Method(magnitude, per="matrix", calibrated=False),
    "wanda": Method(wanda, per="output", calibrated=True),
}


def mask(score_IO: jax.Array, pattern: Pattern, per: Literal["matrix", "output"]) -> jax.Array:
    """True where a weight stays. Exactly round(sparsity * size) of each group go; of equal scores the first goes.

    Raises RequestError when the M of an N:M pattern does not divide the inputs.
    """
    inputs, outputs = score_IO.shape
    if pattern.of:
        if inputs % pattern.of:
            raise RequestError(f"pattern {pattern.keep}:{pattern.of} does not divide {inputs} inputs")
        score_GMO = score_IO.reshape(inputs // pattern.of, pattern.of, outputs)
        return _keep_highest(score_GMO, pattern.keep, axis=1).reshape(inputs, outputs)
    if per == "output":
        return _keep_highest(score_IO, inputs - round(pattern.sparsity * inputs), axis=0)
    size = inputs * outputs
    return _keep_highest(score_IO.reshape(-1), size - round(pattern.sparsity * size), axis=0).reshape(inputs, outputs)


def _keep_highest(score: jax.Array, keep: int, axis: int) -> jax.Array:
    """True at the `keep` highest scores along `axis`; by rank, so that equal scores cannot change the count."""
    order = jnp.argsort(score, axis=axis, stable=True)
    rank = jnp.argsort(order, axis=axis)
    return rank >= score.shape[axis] - keep


def apply(w: Weight, mask_IO: jax.Array) -> Weight:
    """The weight with zeros where the mask is False; a quantized weight keeps its integers and scales elsewhere."""
    return weights.as_node(w).masked(mask_IO)


@partial(jax.jit, static_argnames=("method", "pattern"))
def prune(w: Weight, stats: Moments | None, *, method: str, pattern: Pattern) -> Weight:
    """One matrix [I, O] pruned by a method of METHODS. Zeros that are there score lowest, so they stay zeros."""
    chosen = METHODS[method]
    score_IO = chosen.score(weights.dense(w), stats)
    return apply(w, mask(score_IO, pattern, chosen.per))


def prune_layer(layer: dict[str, Any], stats: dict[str, Moments], *, method: str, pattern: Pattern) -> dict[str, Any]:
    """Every matrix of one layer ({"attn": {"q": {"kernel": ...}}, ...}) pruned; biases and norms are left alone.

    `stats` has the moments of each matrix's inputs by its path ("attn/q"); methods without calibration need none.
    """
    return weights.map_layer(layer, lambda m: prune(m.weight, stats.get(m.module), method=method, pattern=pattern))


def prune_uncalibrated(params: dict[str, Any], *, method: str, pattern: Pattern) -> dict[str, Any]:
    """Every matrix of every stack's blocks ([L, I, O]) pruned layer by layer, by a method that looks at no data."""
    return weights.map_stacks(params, lambda w: prune(w, None, method=method, pattern=pattern))


def check(params: dict[str, Any], pattern: Pattern) -> None:
    """Raises RequestError, naming the first matrix of the blocks whose inputs an N:M pattern does not divide."""
    for m in weights.matrices(params, "block"):
        inputs = m.weight.shape[m.inputs]
        if pattern.of and inputs % pattern.of:
            raise RequestError(f"pattern {pattern.keep}:{pattern.of} does not divide the {inputs} inputs of {m.path}")


def sparsity(params: dict[str, Any]) -> float:
    """Share of exact zeros among the entries of the blocks' matrices, counted."""
    zeros = entries = 0
    for m in weights.matrices(params, "block"):
        values = m.node.values()
        zeros += int(jnp.sum(values == 0))
        entries += values.size
    return zeros / max(entries, 1)
