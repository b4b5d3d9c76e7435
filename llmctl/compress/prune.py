"""Prune matrices in unstructured or N:M patterns: set the weights with the lowest scores to zero.

The zeros themselves are the mask, and nothing else is stored. A stage that trains a sparse artifact keeps `w == 0`.
Scores are in `llmctl.compress.scores`, patterns in `llmctl.compress.pattern`.

Shapes: I inputs, O outputs of one layer's matrix.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llmctl.compress.pattern import Pattern
from llmctl.compress.scores import SCORES
from llmctl.compress.statistics import Moments
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import Matrix, Weight

Sums = Mapping[str, jax.Array]


def mask(score_IO: jax.Array, pattern: Pattern, per: Literal["matrix", "output"]) -> jax.Array:
    """Return a mask [I, O] that is True for every weight to keep.

    Exactly round(sparsity * size) weights of each group are pruned. If scores are equal, the first is pruned first.

    Args:
      score_IO: scores; the lowest are pruned.
      pattern: sparsity pattern.
      per: group within which scores compete in an unstructured pattern: the whole matrix, or each output's inputs.

    Raises:
      RequestError: the M of an N:M pattern does not divide the inputs.
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
    """Return a boolean mask of the shape of `score`, True at the `keep` highest scores along `axis`.

    The mask is computed from ranks, so that equal scores do not change the number of kept weights.
    """
    order = jnp.argsort(score, axis=axis, stable=True)
    rank = jnp.argsort(order, axis=axis)
    return rank >= score.shape[axis] - keep


def apply(w: Weight, mask_IO: jax.Array) -> Weight:
    """Return the weight with zeros where the mask is False.

    The other entries of a quantized weight keep their integers.
    """
    return weights.as_node(w).masked(mask_IO)


@partial(jax.jit, static_argnames=("method", "pattern"))
def prune(
    w: Weight,
    statistics: Moments | None = None,
    gradients: Sums | None = None,
    key: jax.Array | None = None,
    *,
    method: str,
    pattern: Pattern,
) -> Weight:
    """Return one matrix [I, O] with the lowest-scored weights set to zero.

    Weights that are already zero are pruned first, so they count towards the sparsity.

    Args:
      w: the matrix.
      statistics: moments of the matrix's inputs, if the score needs them.
      gradients: sums of the loss's gradient, if the score needs them.
      key: random key of this matrix; a fixed one by default.
      method: name of the score in `SCORES`.
      pattern: sparsity pattern.
    """
    chosen, weights_IO = SCORES[method], weights.dense(w)
    score_IO = chosen.calculate_scores(
        weights_IO, statistics, gradients or {}, jax.random.key(0) if key is None else key
    )
    score_IO = jnp.where(weights_IO == 0, -jnp.inf, score_IO)  # scores may be negative, or 0 for inputs that are 0
    return apply(w, mask(score_IO, pattern, chosen.per))


def prune_layer(
    layer: dict[str, Any],
    statistics: Mapping[str, Moments] | None = None,
    gradients: Mapping[str, Sums] | None = None,
    *,
    method: str,
    pattern: Pattern,
    at: tuple[int, str, int] = (0, "", 0),
) -> dict[str, Any]:
    """Return one layer with every matrix pruned ({"attn": {"q": {"kernel": ...}}, ...}).

    Biases and norms do not change.

    Args:
      layer: parameters of the layer.
      statistics: moments of each matrix's inputs by its path ("attn/q"), if the score needs them.
      gradients: sums of the loss's gradient by the same paths, if the score needs them.
      method: name of the score in `SCORES`.
      pattern: sparsity pattern.
      at: (seed, stack, index of the layer), from which the random key of every matrix is derived.
    """

    def change(m: Matrix) -> Weight:
        known = (statistics or {}).get(m.module), (gradients or {}).get(m.module)
        return prune(m.weight, *known, _key(*at, m.module), method=method, pattern=pattern)

    return weights.map_layer(layer, change)


def prune_uncalibrated(params: dict[str, Any], *, method: str, pattern: Pattern, seed: int = 0) -> dict[str, Any]:
    """Return the parameters with every matrix of the blocks [L, I, O] pruned, by a score that reads no data.

    Each layer is pruned separately.
    """
    changed = {}
    for m in weights.matrices(params, "block"):
        keys = (_key(seed, m.stack, i, m.module) for i in itertools.count())
        changed[m.path] = weights.per_layer(
            m.weight, lambda w, keys=keys: prune(w, key=next(keys), method=method, pattern=pattern)
        )
    return weights.updated(params, changed)


def _key(seed: int, stack: str, index: int, name: str) -> jax.Array:
    """Return the random key of one matrix. The key does not depend on the order in which matrices are pruned."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{stack}/{index}/{name}".encode()))


def check(params: dict[str, Any], pattern: Pattern, per: Literal["matrix", "output"] = "matrix") -> None:
    """Check that a pattern fits the matrices of the blocks.

    Raises:
      RequestError: an N:M pattern does not divide the inputs of a matrix, or the sparsity would prune no weight at all.
    """
    largest = 1
    for m in weights.matrices(params, "block"):
        inputs = m.weight.shape[m.inputs]
        largest = max(largest, inputs if per == "output" else math.prod(m.weight.shape[-2:]))
        if pattern.of and inputs % pattern.of:
            raise RequestError(f"pattern {pattern.keep}:{pattern.of} does not divide the {inputs} inputs of {m.path}")
    if not pattern.of and not round(pattern.sparsity * largest):
        raise RequestError(
            f"sparsity {pattern.sparsity:g} rounds to no weight of {largest:,}; say at least {1 / largest:.2g}"
        )


def sparsity(params: dict[str, Any]) -> float:
    """Return the fraction of exact zeros among the entries of the blocks' matrices."""
    zeros = entries = 0
    for m in weights.matrices(params, "block"):
        values = m.node.values()
        zeros += int(jnp.sum(values == 0))
        entries += values.size
    return zeros / max(entries, 1)
