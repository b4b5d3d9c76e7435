"""Tune the rounding of a layer's weights by signed gradient descent (AutoRound).

SignRound (Cheng et al., 2023, arXiv:2309.05516) tunes these numbers:

- one offset per weight, from -0.5 to 0.5 times the scale. The offset is added to the weight before rounding.
- two factors per group, from 0 to 1. The factors multiply the lowest and the highest weight of the group.

All numbers are tuned together, to minimize the squared error of the layer's output on the calibration inputs. A step
subtracts the learning rate times the sign of the gradient. Gradients pass through rounding unchanged. The learning rate
decreases linearly from 1 / steps to 0.

Each step reads the next batch. After the last batch, the first batch follows again. The error on all batches is
measured before the first step, and ten times during tuning. The state with the least error is kept. The error is
therefore never larger than if every weight is rounded to the nearest level.

Shapes: B batch, T sequence, D model width, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmctl.compress.calibration.calibrate import Visit
from llmctl.compress.quantization import grids
from llmctl.compress.quantization.formats import Format
from llmctl.compress.quantization.levels import IntegerGrid
from llmctl.model import layerwise, weights
from llmctl.model.config import ModelConfig
from llmctl.model.weights import Node

Layer = dict[str, Any]
CHECKS = 10
"""Number of times that the error on all batches is measured during tuning. The error before the first step is not
counted."""


class Tuned(NamedTuple):
    """Store the numbers that are tuned for one matrix."""

    offset_IO: jax.Array
    """Number that is added to each weight before rounding, as a multiple of the weight's scale, from -0.5 to 0.5."""
    low_GO: jax.Array
    """Factor by which the lowest weight of each group is multiplied, from 0 to 1."""
    high_GO: jax.Array
    """Factor by which the highest weight of each group is multiplied, from 0 to 1."""

    @classmethod
    def start(cls, w_IO: jax.Array, group: int) -> Tuned:
        """Return the state that rounds to nearest, with unclipped scales."""
        low_GO, high_GO = (jnp.ones_like(a) for a in grids.ranges(w_IO, group))
        return cls(jnp.zeros(w_IO.shape, jnp.float32), low_GO, high_GO)

    def step(self, gradient: Tuned, rate: jax.Array) -> Tuned:
        """Return the state after one step of signed gradient descent."""
        offset_IO, low_GO, high_GO = (a - rate * jnp.sign(g) for a, g in zip(self, gradient, strict=True))
        return Tuned(jnp.clip(offset_IO, -0.5, 0.5), jnp.clip(low_GO, 0, 1), jnp.clip(high_GO, 0, 1))


class Tuner:
    """Tune the layers of one stack by the same compiled functions.

    Args:
      cfg: config of the model.
      stack: "encoder" or "decoder".
      formats: format of each matrix that is quantized, by its path in the layer ("attn/q"). All formats are integers.
      steps: number of steps per layer.
      dtype: dtype of the layer's computation.
    """

    def __init__(self, cfg: ModelConfig, stack: str, formats: Mapping[str, Format], steps: int, dtype: Any) -> None:
        self.levels: dict[str, tuple[IntegerGrid, int]] = {}
        for module, form in formats.items():
            grid, group = grids.levels_of(form)
            assert isinstance(grid, IntegerGrid)  # the settings refuse other formats
            self.levels[weights.kernel_of(module)] = grid, group
        self.steps = steps
        segments = "encoder_segments" if stack == "encoder" and cfg.encoder_layers else "segments"

        def error(
            tuned: dict[str, Tuned],
            layer: Layer,
            index: jax.Array,
            carry: layerwise.Carry,
            batch: Any,
            goal: jax.Array,
        ) -> jax.Array:
            flat = weights.flatten(layer)
            new = {path: _value(flat[path], tuned[path], *self.levels[path]) for path in self.levels}
            after, _ = layerwise.block(cfg, stack, weights.updated(layer, new), carry, index, dtype=dtype)
            lost_BTD = (after.x_BTD - goal).astype(jnp.float32)
            return jnp.sum(jnp.where(batch[segments][..., None] > 0, jnp.square(lost_BTD), 0.0))

        @partial(jax.jit, donate_argnames=("tuned",))
        def step(
            tuned: dict[str, Tuned], layer: Layer, index: jax.Array, carry: layerwise.Carry, batch: Any,
            goal: jax.Array, rate: jax.Array,
        ) -> dict[str, Tuned]:  # fmt: skip
            gradient = jax.grad(error)(tuned, layer, index, carry, batch, goal)
            return {path: state.step(gradient[path], rate) for path, state in tuned.items()}

        self.error, self.step = jax.jit(error), step

    def start(self, layer: Layer) -> dict[str, Tuned]:
        """Return the state of a layer's matrices before the first step, by the path of the weight."""
        flat = weights.flatten(layer)
        return {path: Tuned.start(flat[path], group) for path, (_, group) in self.levels.items()}

    def tune(self, layer: Layer, visit: Visit) -> tuple[dict[str, Node], dict[str, Any]]:
        """Tune the matrices of one layer.

        Args:
          layer: the layer to round. The layer has the same outputs as `visit.layer`, but its matrices may have scaled
            inputs.
          visit: the layer with its calibration inputs.

        Returns:
          The quantized matrices by their paths in the layer, and JSON data:

          - `step`, the number of steps before the kept state
          - `error_ratio`, the squared error of the kept state / the squared error of rounding to nearest
        """
        index, batches = jnp.int32(visit.index), list(zip(visit.inputs, visit.batches, visit.outputs, strict=True))
        tuned = self.start(layer)

        def total() -> float:
            return sum(float(self.error(tuned, layer, index, *batch)) for batch in batches)

        first = least = total()
        best, kept, pause = jax.tree.map(jnp.copy, tuned), 0, max(1, self.steps // CHECKS)
        for t in range(self.steps):
            rate = jnp.float32((1 - t / self.steps) / self.steps)
            tuned = self.step(tuned, layer, index, *batches[t % len(batches)], rate)
            checked = (t + 1) % pause == 0 or t + 1 == self.steps
            if checked and (now := total()) < least:
                best, least, kept = jax.tree.map(jnp.copy, tuned), now, t + 1
        flat = weights.flatten(layer)
        nodes = {path: finished(flat[path], best[path], *self.levels[path]) for path in self.levels}
        return nodes, {"step": kept, "error_ratio": round(least / first, 6) if first else 1.0}


def _parts(w_IO: jax.Array, tuned: Tuned, grid: IntegerGrid, group: int) -> tuple[jax.Array, Any, jax.Array]:
    """Return the arrays that store a rounded matrix: levels [I, O], scales of groups [G, O], and a scalar factor.

    `Grid.whole` describes the factor.

    Gradients pass through rounding unchanged, but not through clipped levels. Weights that are 0 stay 0.
    """
    full_IO = w_IO.astype(jnp.float32)
    low_GO, high_GO = grids.ranges(full_IO, group)
    whole = grid.whole(full_IO)
    scale_GO = grid.fit(low_GO * tuned.low_GO, high_GO * tuned.high_GO, w_IO.dtype, whole)
    scale_IO = grids.spread(scale_GO, len(w_IO))
    unit_IO, (lowest, highest) = full_IO / grid.step(scale_IO) + tuned.offset_IO, grid.limits(scale_IO)
    soft_IO = jnp.clip(unit_IO, lowest, highest)
    level_IO = soft_IO + jax.lax.stop_gradient(jnp.clip(jnp.round(unit_IO), lowest, highest) - soft_IO)
    return jnp.where(full_IO == 0, 0.0, level_IO), scale_GO, whole


def _value(w_IO: jax.Array, tuned: Tuned, grid: IntegerGrid, group: int) -> jax.Array:
    level_IO, scale_GO, _ = _parts(w_IO, tuned, grid, group)
    return level_IO * grid.step(grids.spread(scale_GO, len(w_IO)))


@partial(jax.jit, static_argnames=("grid", "group"))
def finished(w_IO: jax.Array, tuned: Tuned, grid: IntegerGrid, group: int) -> Node:
    """Return a quantized matrix, rounded with its tuned offsets and factors."""
    level_IO, scale_GO, whole = _parts(w_IO, tuned, grid, group)
    return grid.node(jnp.round(level_IO), scale_GO, whole, w_IO.dtype)
