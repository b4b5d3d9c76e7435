"""Prune single weights in a sparsity pattern: set the weights with the lowest scores to zero, or run SparseGPT.

The zeros themselves are the mask, and nothing else is stored. If a pruned model is trained further, its zeros stay
zero. A `SparseMethod` combines a score (`llmctl.compress.pruning.scores`) or SparseGPT with a pattern
(`llmctl.compress.pruning.pattern`).

Shapes: I inputs, O outputs of one layer's matrix.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.compress.calibration.gradients import Gradients, of_layer
from llmctl.compress.calibration.output_error import replicated, rounded_error
from llmctl.compress.calibration.statistics import Collect, Moments, grams, moments, nothing
from llmctl.compress.pruning import block_pattern, sparsegpt
from llmctl.compress.pruning.masks import counts_with_zeros, mask
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.repair import repair
from llmctl.compress.pruning.scores import SCORES
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import Matrix, Weight

Sums = Mapping[str, jax.Array]


def apply(w: Weight, mask_IO: jax.Array) -> Weight:
    """Return the weight with zeros at the False entries of the mask.

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

    Weights that are already zero are pruned first, so they count towards the sparsity. In a block pattern, blocks of
    zeros are pruned first.

    Args:
      w: the matrix.
      statistics: sums of squares of the matrix's inputs (`Moments`), if the score needs them.
      gradients: sums of the loss's gradient, if the score needs them.
      key: random key of this matrix; a fixed key by default.
      count: number of weights or blocks to prune; by default the number that the pattern gives (see `mask`).
      method: name of the score in `SCORES`.
      pattern: sparsity pattern.
    """
    score_IO = _scores(w, statistics, gradients, key, method)
    return apply(w, mask(score_IO, pattern, SCORES[method].per, count))


def _scores(
    w: Weight, statistics: Moments | None, gradients: Sums | None, key: jax.Array | None, method: str
) -> jax.Array:
    """Return the scores [I, O] of a matrix. Weights that are already zero have the score -infinity."""
    weights_IO = weights.dense(w)
    score_IO = SCORES[method].calculate_scores(
        weights_IO, statistics, gradients or {}, jax.random.key(0) if key is None else key
    )
    return jnp.where(weights_IO == 0, -jnp.inf, score_IO)  # scores may be negative, or 0 for inputs that are 0


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
      statistics: {path of a matrix ("attn/q"): statistic of the inputs}, if the method needs statistics. A statistic is
        a Gram matrix or sums of squares (`Moments`).
      gradients: sums of the loss's gradient by the same paths, if the method needs them.
      method: the method.
      at: (seed, stack, index of the layer), from which the random key of every matrix is derived.
      counts: number of weights or blocks to prune, by path of the matrix; by default the numbers that the pattern
        gives.

    Returns:
      The pruned layer, and JSON data about each matrix by its path:

      - `shape`, the shape of the matrix
      - `zeros`, the number of zeros
      - `error` and `error_before_repair`, the relative errors of the outputs, if there is a Gram matrix
      - `fallback`, a message, if damping values of SparseGPT failed
    """
    notes: dict[str, Any] = {}

    def change(m: Matrix) -> Weight:
        known, own = (statistics or {}).get(m.module), (gradients or {}).get(m.module)
        if counts is None:
            inputs, outputs = m.weight.shape
            count = None if method.pattern.of else method.pattern.count(inputs, outputs, method.per)
        else:
            count = counts[m.module]
        count = counts_with_zeros(m.weight, count, method)
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
    """Prune one matrix by SparseGPT, or by a score with repair. Both read the Gram matrix of the matrix's inputs.

    Return the pruned matrix, and JSON data: the errors, and a message if damping values of SparseGPT failed. Every
    device of the mesh computes the complete matrix, so the result does not depend on the mesh.
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


def prune_uncalibrated(
    params: dict[str, Any],
    *,
    method: str,
    pattern: Pattern,
    seed: int = 0,
    counts: Mapping[tuple[str, int], Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """Return the parameters with every matrix of the layers pruned, by a score that reads no data.

    Each layer of a stacked matrix [layers, I, O] is pruned separately.

    Args:
      params: parameters of the model.
      method: name of the score.
      pattern: sparsity pattern.
      seed: seed of the random keys.
      counts: number of weights or blocks to prune, by (stack, index of the layer) and path of the matrix. By default,
        the pattern gives the numbers.
    """
    changed = {}
    for m in weights.matrices(params, "block"):
        indices = itertools.count()

        def one(w: Weight, m: Matrix = m, indices: Iterator[int] = indices) -> Weight:
            i = next(indices)
            count = counts[m.stack, i][m.module] if counts else None
            return prune(w, None, None, _key(seed, m.stack, i, m.module), count, method=method, pattern=pattern)

        changed[m.path] = weights.per_layer(m.weight, one)
    return weights.updated(params, changed)


@partial(jax.jit, static_argnames=("method", "pattern"))
def block_scores(
    w: Weight, gradients: Sums | None, key: jax.Array | None, *, method: str, pattern: Pattern
) -> jax.Array:
    """Return the scores of a matrix's weights [I, O]; in a block pattern, of its blocks [M, N].

    Zeros have the score -infinity.
    """
    return block_pattern.total_scores(_scores(w, None, gradients, key, method), pattern)


def scored(
    params: dict[str, Any], method: SparseMethod, gradients: Gradients | None = None, seed: int = 0
) -> Iterator[tuple[tuple[str, int], str, jax.Array]]:
    """Yield the scores of every matrix of the layers, as tuples ((stack, index of the layer), path, scores).

    In a block pattern, the scores are those of the blocks. Otherwise, they are those of the weights.

    Args:
      params: parameters of the model.
      method: the pruning method. Its score must not read inputs.
      gradients: sums of the loss's gradients, if the score needs them.
      seed: seed of the random keys.
    """
    for m in weights.matrices(params, "block"):
        for i in range(m.weight.shape[0]):
            own = of_layer(gradients or {}, m.stack, i).get(m.module)
            w, key = weights.layer_of(m.weight, i), _key(seed, m.stack, i, m.module)
            yield (m.stack, i), m.module, block_scores(w, own, key, method=method.name, pattern=method.pattern)


def _key(seed: int, stack: str, index: int, name: str) -> jax.Array:
    """Return the random key of one matrix. The key does not depend on the order in which matrices are pruned."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{stack}/{index}/{name}".encode()))


def collector(method: SparseMethod) -> Collect:
    """Return the `Collect` function of a pruning method.

    For each matrix, the function selects the statistic that the method reads. The statistic is a Gram matrix, sums of
    squares of the inputs, or None.
    """
    return grams if method.hessian else moments if method.moments else nothing


def check(params: dict[str, Any], method: SparseMethod) -> None:
    """Check that a method fits the matrices of the layers.

    Raises:
      RequestError: If a matrix cannot be divided into the groups or blocks of the pattern. If the sparsity would prune
        no weight or block at all. If the method changes the values of kept weights, and a matrix is quantized.
    """
    largest, pattern, per = 1, method.pattern, method.per
    for m in weights.matrices(params, "block"):
        if method.hessian and not weights.is_plain(m.weight):
            raise RequestError(
                f"{m.path} is quantized, and {method.title} gives other values to the weights that it keeps; prune it "
                "by a score such as wanda, or prune the artifact that was quantized"
            )
        inputs, outputs = m.weight.shape[-2:]
        pattern.check(inputs, outputs, m.path)
        rows, columns = inputs // pattern.block_inputs, outputs // pattern.block_outputs
        largest = max(largest, rows if per == "output" else rows * columns)
    if not pattern.of and not round(pattern.sparsity * largest):
        what = "block" if pattern.blocks else "weight"
        raise RequestError(
            f"sparsity {pattern.sparsity:g} rounds to no {what} of {largest:,}; say at least {1 / largest:.2g}"
        )


def sparsity(params: dict[str, Any], pattern: Pattern | None = None) -> float:
    """Return the fraction of exact zeros among the entries of the layers' matrices.

    Args:
      params: parameters of the model.
      pattern: sparsity pattern. For a block pattern, blocks are counted in place of entries.
    """
    zeros = entries = 0
    for m in weights.matrices(params, "block"):
        for i in range(m.weight.shape[0]):  # comparing all layers at once needs as much memory as the matrices
            zero = weights.as_node(weights.layer_of(m.weight, i)).values() == 0
            if pattern and pattern.blocks:
                zero = block_pattern.all_true(zero, pattern)
            zeros += int(jnp.sum(zero))
            entries += zero.size
    return zeros / max(entries, 1)
