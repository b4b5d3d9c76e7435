"""Choose the sparsity of each layer in unstructured pruning: by outliers (OWL), or by measured sensitivity.

This module chooses the number of weights that become zero in each matrix. A pruning score then chooses which weights of
a matrix become zero. All matrices of a layer get the same sparsity. The zeros of all matrices together give exactly the
requested sparsity of the model.

Shapes: B batch, T sequence, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.compress.calibration.calibrate import LayerReport, walk
from llmctl.compress.calibration.gradients import Gradients, of_layer
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.calibration.statistics import Moments, moments
from llmctl.compress.calibration.walk_state import WalkState
from llmctl.compress.pruning import prune
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.distributed import host_arrays
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

LayerAt = tuple[str, int]
"""Layer as a pair (stack, index). The stack is the encoder or the decoder, as in ("decoder", 3)."""
Counts = dict[LayerAt, dict[str, int]]
"""Number of zeros of each matrix, by layer and by the matrix's path within the layer ("attn/q")."""
UNSAVED = Measurements(None)
MOMENTS = ("squares", "count")
"""Names of the arrays of `Moments`."""


def owl(outliers: np.ndarray, sizes: np.ndarray, sparsity: float, spread: float) -> np.ndarray:
    """Return the sparsity of each layer. The more outliers a layer has, the fewer of its weights become zero.

    In OWL (Yin et al., 2023, arXiv:2310.05175), the fraction of kept weights grows linearly with the fraction of
    outliers. The highest and the lowest sparsity among the layers differ by 2 * `spread`. A layer's sparsity can differ
    from `sparsity` by nearly 2 * `spread`. Therefore, 2 * `spread` must be less than `sparsity` and less than 1 -
    `sparsity`.

    >>> owl(np.array([0.0, 1.0, 3.0]), np.ones(3), 0.5, 0.15).round(3).tolist()
    [0.633, 0.533, 0.333]

    Args:
      outliers: fraction of each layer's weights that are outliers.
      sizes: number of weights of each layer.
      sparsity: sparsity of all layers together.
      spread: half the difference between the highest and the lowest sparsity among the layers.
    """
    width = float(np.ptp(outliers))
    kept = 2 * spread * (outliers - outliers.min()) / width if width > 0 else np.zeros(len(outliers))
    return sparsity - (kept - np.average(kept, weights=sizes))


def by_sensitivity(errors: np.ndarray, sizes: np.ndarray, sparsity: float, spread: float) -> np.ndarray:
    """Return the sparsity of each layer, lower for layers whose error grows more with the sparsity.

    The error of a layer is measured at three sparsities, and interpolated linearly between them. Each layer thus has a
    lower and an upper range of sparsity. Within a range, every further zero adds the same error. All layers start at
    the lowest sparsity. Zeros are then added to the range whose zeros add the least error. If this range is full, the
    range with the next larger error per zero follows. Among ranges with equal error per zero, lower ranges come first,
    and layers get zeros in proportion to their sizes. Layers with equal errors therefore get equal sparsities.

    The result minimizes the sum of the errors if no layer's lower range adds more error than its upper range. If the
    lower range of a layer adds more error, both ranges get the mean of the two errors. The result is then an
    approximation.

    >>> by_sensitivity(np.array([[0.0, 1.0, 3.0], [0.0, 0.1, 0.3]]), np.ones(2), 0.5, 0.1).round(3).tolist()
    [0.4, 0.6]

    Args:
      errors: errors [layers, 3] of the model. For row l, only layer l is pruned. The columns are the sparsities of
        layer l: sparsity - spread, sparsity, and sparsity + spread.
      sizes, sparsity, spread: see `owl`.
    """
    costs = np.diff(errors, axis=1)
    concave = costs[:, 0] > costs[:, 1]
    costs[concave] = costs[concave].mean(axis=1, keepdims=True)
    costs /= sizes[:, None]
    budget, zeros = spread * sizes.sum(), np.zeros(len(sizes))
    for cost in np.unique(costs):
        for half in cost == costs.T:  # a layer's first half precedes its second one: it costs no more
            room = spread * np.where(half, sizes, 0)
            taken = min(budget, room.sum())
            zeros += taken * room / max(room.sum(), 1e-30)
            budget -= taken
    return sparsity - spread + zeros / sizes


def whole_counts(targets: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Return integers near `targets`, between `least` and `most`, that add up to `total`.

    >>> whole_counts(np.array([1.5, 1.5, 4.0]), np.array([0, 3, 0]), np.array([9, 9, 9]), 8).tolist()
    [1, 3, 4]
    """
    targets = np.clip(targets, least, most).astype(float)
    missing = total - targets.sum()
    room = most - targets if missing > 0 else targets - least
    targets += missing * room / max(room.sum(), 1e-30)
    counts = np.floor(targets + 1e-9).astype(np.int64)
    for i in np.argsort(counts - targets, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return counts


def sizes_of(params: dict[str, Any], layers: Sequence[LayerAt]) -> np.ndarray:
    """Return the number of weights in the matrices of each layer."""
    one = {stack: 0 for stack, _ in layers}
    for m in weights.matrices(params, "block"):
        one[m.stack] += math.prod(m.weight.shape[1:])
    return np.array([one[stack] for stack, _ in layers])


def counts(params: dict[str, Any], layers: Sequence[LayerAt], sparsities: np.ndarray, sparsity: float) -> Counts:
    """Return the number of zeros of every matrix. The numbers add up to round(sparsity * number of weights).

    Weights that are already zero stay zero and are counted, so no matrix loses zeros.

    Args:
      params: parameters of the model.
      layers: the layers.
      sparsities: sparsity of each layer.
      sparsity: sparsity of all layers together.
    """
    own = dict(zip(layers, sparsities.tolist(), strict=True))
    places, targets, least, most = [], [], [], []
    for m in weights.matrices(params, "block"):
        size = math.prod(m.weight.shape[1:])
        zeros = np.asarray(jnp.sum(m.node.values() == 0, axis=(1, 2)))
        for i, there in enumerate(zeros):
            places.append(((m.stack, i), m.module))
            targets.append(own[m.stack, i] * size)
            least.append(int(there))
            most.append(size)
    total = max(round(sparsity * sum(most)), sum(least))
    whole = whole_counts(np.array(targets), np.array(least), np.array(most), total)
    found: Counts = {at: {} for at in layers}
    for (at, module), count in zip(places, whole, strict=True):
        found[at][module] = int(count)
    return found


def outlier_ratios(
    params: dict[str, Any], layers: Sequence[LayerAt], stats: Mapping[LayerAt, Mapping[str, Any]], threshold: float
) -> np.ndarray:
    """Return the fraction of outliers in each layer.

    A weight is an outlier if its Wanda score exceeds `threshold` times the mean score of the layer.

    Args:
      params: parameters of the model.
      layers: the layers.
      stats: sums of squares of each matrix's inputs (`Moments`), by layer and path of the matrix.
      threshold: the factor M of OWL.
    """
    ratios = []
    for stack, i in layers:
        layer = weights.layer_of(params[stack]["blocks"], i)
        ratios.append(float(outlier_ratio(layer, dict(stats[stack, i]), threshold)))
    return np.array(ratios)


@jax.jit
def outlier_ratio(layer: dict[str, Any], stats: dict[str, Any], threshold: jax.Array | float) -> jax.Array:
    """Return the fraction of outliers in one layer, a scalar. `outlier_ratios` describes the arguments."""
    scores = [
        jnp.abs(weights.dense(m.weight)) * jnp.sqrt(stats[m.module].squares)[:, None]
        for m in weights.layer_matrices(layer)
    ]
    size = sum(s.size for s in scores)
    mean = jnp.sum(jnp.stack([jnp.sum(s) for s in scores])) / size
    return jnp.sum(jnp.stack([jnp.sum(s > threshold * mean) for s in scores])) / size


def scan(
    cfg: ModelConfig,
    params: dict[str, Any],
    batch: dict[str, Any],
    layers: Sequence[LayerAt],
    prune_one: Callable[[LayerAt, float], dict[str, Any]],
    sparsities: Sequence[float],
    dtype: Any = jnp.float32,
    saved: Measurements = UNSAVED,
) -> np.ndarray:
    """Prune one layer at a time, and return the errors [layers, sparsities] of the model's final hidden states.

    An error is the squared norm of the states' change, divided by the squared norm of the unpruned model's states. The
    norms do not include padding.

    Args:
      cfg: config of the model.
      params: parameters of the model. They do not change.
      batch: calibration batch.
      layers: the layers to prune, each alone.
      prune_one: function (layer, sparsity) -> the parameters of this layer, pruned to this sparsity.
      sparsities: sparsities to try for each layer.
      dtype: dtype of the computation.
      saved: errors of layers that an interrupted run measured.
    """
    states_of, error_of = scan_programs(cfg, dtype)
    states_of = cache(partial(states_of, params, batch))

    def measured(stack: str, i: int) -> dict[str, np.ndarray]:
        changed = (prune_one((stack, i), sparsity) for sparsity in sparsities)
        found = [float(error_of[stack](params, new, jnp.int32(i), batch, states_of())) for new in changed]
        return {"errors": np.array(found)}

    return np.stack([saved.get(f"errors.{s}.{i:05d}", partial(measured, s, i))["errors"] for s, i in layers])


def scan_programs(cfg: ModelConfig, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Return the compiled functions that `scan` runs: one for final hidden states, and one per stack for errors.

    The functions for errors are a dictionary by stack ("encoder", "decoder"). Each function replaces a layer by a
    pruned layer, and returns the resulting error of the final hidden states.
    """

    def error(
        params: dict[str, Any], layer: dict[str, Any], index: jax.Array, batch: dict[str, Any], states_BTD: jax.Array,
        stack: str,
    ) -> jax.Array:  # fmt: skip
        blocks = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, index, 0), params[stack]["blocks"], layer
        )
        changed = {**params, stack: {**params[stack], "blocks": blocks}}
        lost_BTD = functional.hidden(cfg, changed, batch, dtype=dtype).astype(jnp.float32) - states_BTD
        real_BT1 = (jnp.asarray(batch["segments"]) > 0)[..., None]
        return jnp.sum(jnp.square(lost_BTD) * real_BT1) / jnp.sum(jnp.square(states_BTD) * real_BT1)

    states = jax.jit(lambda params, batch: functional.hidden(cfg, params, batch, dtype=dtype).astype(jnp.float32))
    return states, {stack: jax.jit(partial(error, stack=stack)) for stack in functional.stacks(cfg)}


def allocate(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[dict[str, Any]],
    method: SparseMethod,
    *,
    gradients: Gradients | None = None,
    seed: int = 0,
    progress: Callable[[LayerReport], None] | None = None,
    dtype: Any = jnp.float32,
    saved: Measurements = UNSAVED,
) -> Counts:
    """Choose a sparsity for each layer of a model, and return the number of zeros of every matrix.

    First the calibration batches pass through the unpruned model, to measure the inputs of every matrix. If the
    allocation is "sensitivity", each layer is also pruned alone, to measure the error on the first batch (`scan`).
    These trials use the method's score, or Wanda's score if the method is SparseGPT. No weights are repaired. The
    parameters do not change.

    Args:
      cfg: config of the model.
      params: parameters of the model.
      batches: calibration batches.
      method: the pruning method. Its allocation must not be uniform.
      gradients: sums of the loss's gradients, if the score needs them.
      seed: seed of the random keys (see `prune_layer`).
      progress: function that is called with the report of each measured layer.
      dtype: dtype of the computation.
      saved: measurements of an interrupted run: the inputs of all layers, and the errors of each layer.
    """
    chosen, sparsity = method.allocation, method.pattern.sparsity
    layers = [(stack, i) for stack in functional.stacks(cfg) for i in range(functional.depth(cfg, stack))]

    def measured() -> dict[str, np.ndarray]:
        _, reports = walk(cfg, params, batches, moments, keep=True, progress=progress, state=state, dtype=dtype)
        named = ((f"{r.stack}.{r.layer}.{path}", stat) for r in reports for path, stat in r.stats.items())
        return {f"{name}:{part}": host_arrays.read(getattr(s, part)) for name, s in named for part in MOMENTS}

    state = WalkState(saved, "inputs")
    inputs: dict[str, Any] = saved.get("inputs", measured)
    state.drop()
    stats: dict[LayerAt, dict[str, Moments]] = {at: {} for at in layers}
    for name in {name.partition(":")[0] for name in inputs}:
        stack, i, path = name.split(".", 2)
        stats[stack, int(i)][path] = Moments(*(inputs[f"{name}:{part}"] for part in MOMENTS))
    sizes = sizes_of(params, layers)
    if chosen.name == "owl":
        sparsities = owl(outlier_ratios(params, layers, stats, chosen.outlier), sizes, sparsity, chosen.spread)
    else:

        def prune_one(at: LayerAt, sparsity: float) -> dict[str, Any]:
            layer = weights.layer_of(params[at[0]]["blocks"], at[1])
            sums = of_layer(gradients or {}, *at)
            return prune.prune_layer(layer, stats[at], sums, method=method.score_only(sparsity), at=(seed, *at))[0]

        scanned = (sparsity - chosen.spread, sparsity, sparsity + chosen.spread)
        errors = scan(cfg, params, batches[0], layers, prune_one, scanned, dtype, saved)
        sparsities = by_sensitivity(errors, sizes, sparsity, chosen.spread)
    return counts(params, layers, sparsities, sparsity)
