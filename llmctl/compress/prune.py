"""Prune matrices in unstructured or N:M patterns: set the weights with the lowest scores to zero, or run SparseGPT.

The zeros themselves are the mask, and nothing else is stored. If a pruned model is trained further, its zeros stay
zero. A `SparseMethod` combines a score (`llmctl.compress.scores`) or SparseGPT with a pattern
(`llmctl.compress.pattern`).

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

from llmctl.compress import sparsegpt
from llmctl.compress.output_error import replicated, rounded_error
from llmctl.compress.pattern import Pattern
from llmctl.compress.repair import repair
from llmctl.compress.scores import SCORES
from llmctl.compress.sparse_method import SparseMethod
from llmctl.compress.statistics import Collect, Moments, grams, moments, nothing
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import Matrix, Weight

Sums = Mapping[str, jax.Array]


def mask(
    score_IO: jax.Array, pattern: Pattern, per: Literal["matrix", "output"], count: jax.Array | int | None = None
) -> jax.Array:
    """Return a mask [I, O] that is True for every weight to keep.

    If scores are equal, the first is pruned first.

    Args:
      score_IO: scores; the lowest are pruned.
      pattern: sparsity pattern.
      per: group within which scores compete in an unstructured pattern: the complete matrix, or each output's inputs.
      count: number of weights to prune; by default the number that the pattern gives. In an N:M pattern it is the
        number per M inputs. If it cannot be the same for every output of an unstructured pattern, the first outputs
        prune one more. If scores compete per output, an array [O] gives the number of each output.

    Raises:
      RequestError: If the M of an N:M pattern does not divide the inputs.
    """
    inputs, outputs = score_IO.shape
    if pattern.of:
        if inputs % pattern.of:
            raise RequestError(f"pattern {pattern.keep}:{pattern.of} does not divide {inputs} inputs")
        score_GMO = score_IO.reshape(inputs // pattern.of, pattern.of, outputs)
        keep = pattern.keep if count is None else pattern.of - count
        return _keep_highest(score_GMO, keep, axis=1).reshape(inputs, outputs)
    count = pattern.count(inputs, outputs, per) if count is None else count
    if per == "output":
        each_O = count if jnp.ndim(count) else _shares(count, outputs)
        return _keep_highest(score_IO, inputs - each_O, axis=0)
    return _keep_highest(score_IO.reshape(-1), inputs * outputs - count, axis=0).reshape(inputs, outputs)


def _shares(count: jax.Array | int, outputs: int) -> jax.Array:
    return count // outputs + (jnp.arange(outputs) < count % outputs)


def _counts(w: Weight, count: int | None, per: Literal["matrix", "output"]) -> jax.Array | int | None:
    """Return the number of weights to prune in a matrix, in the form that `prune` expects as its argument `count`.

    It is `count` itself, unless each output prunes its own share and an output already has more zeros than its share.
    Zeros stay, so the other outputs must then prune fewer weights. In this case, the result is an array [O] of the
    numbers per output. Its sum is `count`, or the number of zeros if that is larger.
    """
    if per == "matrix" or count is None:
        return count
    counts_O, exceeded = _with_zeros(weights.as_node(w).values(), count)
    return counts_O if exceeded else count


@jax.jit
def _with_zeros(values_IO: jax.Array, count: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Return the number of weights to prune per output, and whether any output has more zeros than its share.

    Further zeros are added until the matrix has `count`. Outputs with fewer zeros than their share get them, in
    proportion to the number that they lack.
    """
    zeros_O = jnp.sum(values_IO == 0, axis=0)
    each_O = _shares(count, values_IO.shape[1])
    until_O = jnp.cumsum(jnp.maximum(each_O - zeros_O, 0))
    missing, share_O = jnp.maximum(count - jnp.sum(zeros_O), 0), until_O / jnp.maximum(until_O[-1], 1)
    until_O = jnp.minimum(jnp.round(share_O * missing).astype(jnp.int32), missing).at[-1].set(missing)
    return zeros_O + jnp.diff(until_O, prepend=0), jnp.any(zeros_O > each_O)


def _keep_highest(score: jax.Array, keep: jax.Array | int, axis: int) -> jax.Array:
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
    count: jax.Array | int | None = None,
    *,
    method: str,
    pattern: Pattern,
) -> Weight:
    """Return one matrix [I, O] with the lowest-scored weights set to zero.

    Weights that are already zero are pruned first, so they count towards the sparsity.

    Args:
      w: the matrix.
      statistics: sums of squares of the matrix's inputs (`Moments`), if the score needs them.
      gradients: sums of the loss's gradient, if the score needs them.
      key: random key of this matrix; a fixed one by default.
      count: number of zeros of an unstructured pattern; by default the number that the pattern gives (see `mask`).
      method: name of the score in `SCORES`.
      pattern: sparsity pattern.
    """
    chosen, weights_IO = SCORES[method], weights.dense(w)
    score_IO = chosen.calculate_scores(
        weights_IO, statistics, gradients or {}, jax.random.key(0) if key is None else key
    )
    score_IO = jnp.where(weights_IO == 0, -jnp.inf, score_IO)  # scores may be negative, or 0 for inputs that are 0
    return apply(w, mask(score_IO, pattern, chosen.per, count))


def prune_layer(
    layer: dict[str, Any],
    statistics: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Sums] | None = None,
    *,
    method: SparseMethod,
    at: tuple[int, str, int] = (0, "", 0),
    counts: Mapping[str, int] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prune every matrix of one layer ({"attn": {"q": {"kernel": ...}}, ...}). Biases and norms do not change.

    Args:
      layer: parameters of the layer.
      statistics: statistics of each matrix's inputs by its path ("attn/q"), if the method needs them: a Gram matrix, or
        sums of squares (`Moments`).
      gradients: sums of the loss's gradient by the same paths, if the method needs them.
      method: the method.
      at: (seed, stack, index of the layer), from which the random key of every matrix is derived.
      counts: number of zeros of each matrix by its path, in an unstructured pattern; by default the numbers that the
        pattern gives.

    Returns:
      The pruned layer, and JSON data about each matrix by its path: `shape`, `zeros` (their number), `error` (the
      relative error of its outputs, if there is a Gram matrix), `error_before_repair`, and `fallback` (what was used
      instead, if the method could not be used as asked).
    """
    notes: dict[str, Any] = {}

    def change(m: Matrix) -> Weight:
        known, own = (statistics or {}).get(m.module), (gradients or {}).get(m.module)
        if counts is None:
            inputs, outputs = m.weight.shape
            count = None if method.pattern.of else method.pattern.count(inputs, outputs, method.per)
        else:
            count = counts[m.module]
        count = _counts(m.weight, count, method.per)
        if method.hessian:
            new, found = _by_hessian(m.weight, known, own, _key(*at, m.module), count, method)
        else:
            new = prune(m.weight, known, own, _key(*at, m.module), count, method=method.name, pattern=method.pattern)
            found = {}
        zeros = weights.as_node(new).values() == 0
        notes[m.module] = {"shape": list(m.weight.shape), "zeros": int(zeros.sum()), **found}
        return new

    return weights.map_layer(layer, change), notes


def _by_hessian(
    w: jax.Array,
    statistics: Any,
    gradients: Sums | None,
    key: jax.Array,
    count: jax.Array | int | None,
    method: SparseMethod,
) -> tuple[jax.Array, dict[str, Any]]:
    """Prune one matrix by SparseGPT or with repair, which read the Gram matrix of its inputs.

    Return the pruned matrix, and JSON data about it: its errors, and the fallback if one was used. Every device of the
    mesh computes the complete matrix, so the result does not depend on the mesh.
    """
    whole, gram_II = (replicated(a) for a in (w, statistics.products[0]))
    found: dict[str, Any] = {}
    if method.score is None:
        new, attempts = sparsegpt.prune(whole, gram_II, count or 0, method.damping, pattern=method.pattern)
        if int(attempts):
            found["fallback"] = sparsegpt.fallback(int(attempts), method.damping)
    else:
        new = prune(w, statistics, gradients, key, count, method=method.name, pattern=method.pattern)
        new = replicated(new)
    if method.repair:
        found["error_before_repair"] = rounded_error(gram_II, whole, new)
        new = repair(whole, new, gram_II)
    return new, found | {"error": rounded_error(gram_II, whole, new)}


def prune_uncalibrated(params: dict[str, Any], *, method: str, pattern: Pattern, seed: int = 0) -> dict[str, Any]:
    """Return the parameters with every matrix of the layers pruned, by a score that reads no data.

    Each layer of a stacked matrix [layers, I, O] is pruned separately.
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


def collector(method: SparseMethod) -> Collect:
    """Return the function that selects the statistics of each matrix that the method needs (see `Collect`)."""
    return grams if method.hessian else moments if method.moments else nothing


def check(params: dict[str, Any], method: SparseMethod) -> None:
    """Check that a method fits the matrices of the layers.

    Raises:
      RequestError: If an N:M pattern does not divide the inputs of a matrix, or the sparsity would prune no weight at
        all. Also if the method changes the values of kept weights, and a matrix is quantized.
    """
    largest, pattern, per = 1, method.pattern, method.per
    for m in weights.matrices(params, "block"):
        if method.hessian and not weights.is_plain(m.weight):
            raise RequestError(
                f"{m.path} is quantized, and {method.title} gives other values to the weights that it keeps; prune it "
                "by a score such as wanda, or prune the artifact that was quantized"
            )
        inputs = m.weight.shape[m.inputs]
        largest = max(largest, inputs if per == "output" else math.prod(m.weight.shape[-2:]))
        if pattern.of and inputs % pattern.of:
            raise RequestError(f"pattern {pattern.keep}:{pattern.of} does not divide the {inputs} inputs of {m.path}")
    if not pattern.of and not round(pattern.sparsity * largest):
        raise RequestError(
            f"sparsity {pattern.sparsity:g} rounds to no weight of {largest:,}; say at least {1 / largest:.2g}"
        )


def sparsity(params: dict[str, Any]) -> float:
    """Return the fraction of exact zeros among the entries of the layers' matrices."""
    zeros = entries = 0
    for m in weights.matrices(params, "block"):
        values = m.node.values()
        zeros += int(jnp.sum(values == 0))
        entries += values.size
    return zeros / max(entries, 1)
