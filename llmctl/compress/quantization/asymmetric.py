"""Define integers with a scale and a zero point per group, for weights that are not symmetric around 0.

A weight is (integer - zero point) * scale. The levels cover the range from the lowest to the highest weight of a group.
The levels always include 0, so zeros of a pruned matrix stay zeros.

Shapes: I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix

from llmctl.compress.quantization.levels import SMALLEST, IntegerGrid, packed_table
from llmctl.model.weights import Node, Packed, Quantized


class Affine(NamedTuple):
    """Store the scale and the zero point of each group, both float32."""

    scale: jax.Array
    zero: jax.Array
    """Integer that stores the weight 0."""


@dataclass(frozen=True)
class AsymmetricIntegers(IntegerGrid):
    """Define integers of `bits` bits with zero points. A level is an integer minus the zero point of the group.

    >>> grid = AsymmetricIntegers(2)
    >>> fitted = grid.fit(jnp.float32(-0.5), jnp.float32(1.0), jnp.float32, jnp.float32(1))
    >>> float(fitted.scale), float(fitted.zero), grid.round(jnp.array([-0.6, 0.1, 0.4, 3.0]), fitted).tolist()
    (0.5, -1.0, [-0.5, 0.0, 0.5, 1.0])
    """

    bits: int

    @property
    def bound(self) -> float:
        """Return the number of steps between the lowest and the highest integer."""
        return 2.0**self.bits - 1

    @property
    def lowest(self) -> float:
        """Return the lowest integer."""
        return -(2.0 ** (self.bits - 1))

    def fit(self, low: jax.Array, high: jax.Array, dtype: Any, whole: jax.Array) -> Affine:
        """Return the scales and zero points of groups, given the lowest and the highest weight of each group."""
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scale = ((high - low) / self.bound).astype(dtype).astype(jnp.float32)
        scale = jnp.where(scale < SMALLEST, 1.0, scale)
        zero = self.lowest + jnp.round(-low / scale)
        return Affine(scale, jnp.clip(zero, self.lowest, self.lowest + self.bound))

    def level(self, w: jax.Array, scale: Any) -> jax.Array:
        """Return the level nearest to each weight, float32. Scales and zero points are broadcast to the weights."""
        return jnp.clip(jnp.round(w / scale.scale), *self.limits(scale))

    def limits(self, scale: Any) -> tuple[jax.Array, jax.Array]:
        """Return the lowest and the highest level of each group: integers minus the group's zero point."""
        first = self.lowest - scale.zero
        return first, first + self.bound

    def step(self, scale: Any) -> jax.Array:
        """Return the distance between neighboring values: the scale, without the zero point."""
        return scale.scale

    def round(self, w: jax.Array, scale: Any) -> jax.Array:
        """Return the representable value nearest to each weight, float32. Scales and zero points are broadcast to the
        weights."""
        return self.level(w, scale) * scale.scale

    def nearest(self, unit: jax.Array) -> jax.Array:
        """Return the nearest integers."""
        return jnp.round(unit)

    def node(self, level_IO: jax.Array, scale_GO: Any, whole: jax.Array, dtype: Any) -> Node:
        """Return the weight node that stores integers, scales and zero points."""
        scale, zero = scale_GO
        integer_IO = level_IO + jnp.repeat(zero, len(level_IO) // len(zero), axis=0)
        if self.bits < 4:
            factor = jnp.ones((1, 1), dtype)
            return Packed.of(f"int{self.bits}", integer_IO, scale.astype(dtype), factor, zero.astype(jnp.int4))
        stored = jnp.dtype(f"int{self.bits}")
        array = qwix.QArray(integer_IO.astype(stored), scale.astype(dtype), zero.astype(stored), qtype=stored)
        return Quantized(array)

    def table(self, node: Any) -> Any:
        """Return the node of an embedding table [V, D], given the node of the transposed matrix [D, V]."""
        return packed_table(super().table(node)) if self.bits < 4 else super().table(node)
