"""Define the compiled functions that run a calibration batch through one layer, or through the output head.

The functions also accept abstract arrays, so that `llmctl plan` can compile them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.compress.calibration.statistics import Collect, LayerStats
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, layerwise, wiring
from llmctl.model.config import ModelConfig

Batch = dict[str, Any]
Layer = dict[str, Any]


def passes(cfg: ModelConfig, stack: str, dtype: Any) -> tuple[Any, Any]:
    """Return the compiled functions (observe, advance) for the layers of the encoder or the decoder.

    `observe` runs the unchanged layer and collects statistics. `advance` runs the changed layer and measures its error.
    """
    beside = stack == "encoder" and cfg.encoder_layers > 0

    def real(batch: Batch, path: str) -> jax.Array:
        """Return a mask [N] of the tokens that the matrix at `path` reads: True except at padding.

        Keys and values of cross-attention read the encoder's tokens.
        """
        memory = beside or path in ("cross/k", "cross/v")
        return jnp.asarray(batch["encoder_segments" if memory else "segments"]).reshape(-1) > 0

    @partial(jax.jit, donate_argnames=("stats",))
    def observe(
        layer: Layer, index: jax.Array, carry: layerwise.Carry, batch: Batch, stats: LayerStats
    ) -> tuple[Any, LayerStats, Any]:
        """Run one batch through the unchanged layer. The statistics are donated, so memory holds them once.

        Returns:
          (output, updated statistics, [sum over tokens of 1 - cosine(input, output), number of tokens]).
        """
        out, taps = layerwise.block(cfg, stack, layer, carry, index, taps=True, dtype=dtype)
        stats = _folded(stats, {path: (taps[path], real(batch, path)) for path in stats.of_inputs})
        return out, stats, _influence(carry.x_BTD, out.x_BTD, real(batch, ""))

    @jax.jit
    def advance(
        new: Layer, index: jax.Array, carry: layerwise.Carry, before_BTD: jax.Array, batch: Batch
    ) -> tuple[Any, Any]:
        """Run one batch through the changed layer, and return (output, two squared norms).

        `before_BTD` is the output of the unchanged layer, from `observe`. The norms are [||changed output - unchanged
        output||^2, ||unchanged output - input||^2], without padding.
        """
        after, _ = layerwise.block(cfg, stack, new, carry, index, dtype=dtype)
        mask = real(batch, "")
        norms = _square_norm(after.x_BTD - before_BTD, mask), _square_norm(before_BTD - carry.x_BTD, mask)
        return after, jnp.stack(norms)

    return observe, advance


def empty(
    cfg: ModelConfig, stack: str, layer: Layer, carry: layerwise.Carry, collect: Collect, dtype: Any
) -> LayerStats:
    """Return the initial statistics of one layer, before any tokens are added."""
    run = partial(layerwise.block, cfg, stack, taps=True, dtype=dtype)
    _, taps = jax.eval_shape(lambda layer, carry: run(layer, carry, 0), layer, carry)
    return _selected(taps, collect, wiring.first_readers(cfg, stack))


def head_passes(cfg: ModelConfig, dtype: Any) -> tuple[Any, Any]:
    """Return the compiled functions (observe, compare) for the output head.

    `observe` collects the statistics of the unchanged head. `compare` measures the error of the changed head.
    """

    @partial(jax.jit, donate_argnames=("stats",))
    def observe(params: Layer, x_BTD: jax.Array, batch: Batch, stats: LayerStats) -> LayerStats:
        """Return the statistics with the final hidden states of one batch added. The argument `stats` is donated."""
        taps = layerwise.head_taps(cfg, params, x_BTD, batch, dtype)
        real_BT = jnp.asarray(batch["segments"]) > 0

        def real(rows: int) -> jax.Array:  # pooled inputs have one row per sequence
            return real_BT.reshape(-1) if rows == real_BT.size else real_BT.any(axis=1)

        return _folded(stats, {path: (taps[path], real(len(taps[path]))) for path in stats.of_inputs})

    @jax.jit
    def compare(old: Layer, new: Layer, x_BTD: jax.Array, batch: Batch) -> jax.Array:
        """Return [||changed output - unchanged output||^2, ||unchanged output||^2] of one batch, without padding."""
        real_BT = jnp.asarray(batch["segments"]) > 0
        total = jnp.zeros(2)
        if cfg.head_kind.vocabulary:

            def one(position: tuple[jax.Array, jax.Array]) -> jax.Array:  # logits of all positions may not fit
                x_BD, real_B = position
                before, after = (functional.lm_logits(cfg, params, x_BD, dtype) for params in (old, new))
                return jnp.stack([_square_norm(after - before, real_B), _square_norm(before, real_B)])

            total += jnp.sum(jax.lax.map(one, (jnp.swapaxes(x_BTD, 0, 1), real_BT.T)), axis=0)
        if "head" in old or not cfg.head_kind.vocabulary:
            before, after = (functional.outputs(cfg, params, x_BTD, batch, dtype) for params in (old, new))
            real = real_BT.any(axis=1)
            if before.ndim == 3:  # one output per token
                real = real_BT.reshape(-1)
            before, after = (a.reshape(len(real), -1) for a in (before, after))
            total += jnp.stack([_square_norm(after - before, real), _square_norm(before, real)])
        return total

    return observe, compare


def empty_of_head(
    cfg: ModelConfig, params: Layer, x_BTD: jax.Array, batch: Batch, collect: Collect, dtype: Any
) -> LayerStats:
    """Return the initial statistics of the output head, before any tokens are added."""
    taps = jax.eval_shape(partial(layerwise.head_taps, cfg, dtype=dtype), params, x_BTD, batch)
    return _selected(taps, collect, {})


def _selected(taps: dict[str, Any], collect: Collect, first_readers: Mapping[str, str]) -> LayerStats:
    """Return the initial statistics that `collect` selects. Matrices with the same inputs share one statistic."""
    of_inputs: dict[str, Any] = {}
    keys: dict[Any, str] = {}
    first: list[tuple[str, str]] = []
    for path, tap in sorted(taps.items()):
        stat = collect(path, tap.shape[-1])
        if stat is None:
            continue
        leaves, kind = jax.tree.flatten(stat)
        shapes = tuple((a.shape, a.dtype) for a in leaves)
        key = keys.setdefault((first_readers.get(path, path), kind, shapes), path)
        of_inputs.setdefault(key, stat)
        first.append((path, key))
    return LayerStats(of_inputs, tuple(first))


def placed(stats: LayerStats) -> LayerStats:
    """Replicate initial statistics on all devices of the current mesh. Without a mesh, return the statistics
    unchanged."""
    current = meshes.current()
    return stats if current is None else jax.device_put(stats, meshes.replicated(current))


def _folded(stats: LayerStats, inputs: Mapping[str, tuple[jax.Array, jax.Array]]) -> LayerStats:
    """Add one batch to the statistics of a layer, and return the statistics, replicated on all devices.

    XLA reuses the memory of donated statistics only if argument and result have the same sharding.

    Args:
      stats: statistics before the batch.
      inputs: for each key of `stats.of_inputs`, the pair (inputs [N, I] of a matrix, mask [N]). The mask is False at
          padding.
    """
    new = {path: stat.fold(*inputs[path]) for path, stat in stats.of_inputs.items()}
    return replace(stats, of_inputs=jax.tree.map(lambda a: meshes.constrain(a, *[None] * a.ndim), new))


def _influence(x_BTD: jax.Array, y_BTD: jax.Array, real_N: jax.Array) -> jax.Array:
    """Return [sum over tokens of 1 - cosine(x, y), number of tokens], both without padding."""
    x_ND, y_ND = (v.astype(jnp.float32).reshape(-1, v.shape[-1]) for v in (x_BTD, y_BTD))
    norms = jnp.linalg.norm(x_ND, axis=-1) * jnp.linalg.norm(y_ND, axis=-1)
    cosine = jnp.sum(x_ND * y_ND, axis=-1) / jnp.maximum(norms, 1e-30)
    return jnp.stack([jnp.sum(jnp.where(real_N, 1.0 - cosine, 0.0)), jnp.sum(real_N).astype(jnp.float32)])


def _square_norm(x_BTD: jax.Array, real_N: jax.Array) -> jax.Array:
    x_ND = x_BTD.astype(jnp.float32).reshape(-1, x_BTD.shape[-1])
    return jnp.sum(jnp.where(real_N[:, None], jnp.square(x_ND), 0.0))
