"""Store cached keys and values in 8 or 4 bits, with one scale per token and key/value head.

Keys and values are rotated within each head by a Hadamard matrix. The rotation spreads the outliers of single channels
over all channels (QuaRot; Ashkboos et al., 2024, arXiv:2404.00456). Queries are rotated in the same way, and the
outputs are rotated back. Without rounding, the result would therefore not change. With SmolLM2-135M, the rotation
halves the error of the logits.

The keys of a head have a large mean, which would need most of the range of the codes. A cache of keys therefore stores
one vector per row and head, the center. The center is the mean of the first keys of the prompt. The center is
subtracted from each key before the key is rounded. Attention adds the product of query and center to the score, so only
the rounding changes. If a key has a smaller range without the subtraction, the center is not subtracted. The scale of
such a key is negative. An example is the key of the first token in a text, to which many heads attend. With
SmolLM2-135M and int8, centers lower the error of the logits from 0.026 to 0.019 (root mean square). Unquantized keys
and values in bfloat16 have an error of 0.010.

A rotated value is a code times the scale of its token and head. Attention multiplies queries by the codes, and
multiplies the scores by the scales afterwards. Dequantized keys and values are therefore never stored for all layers.
The formats are int8 (integers from -127 to 127), fp8_e4m3 (8-bit floats, float8_e4m3fn) and int4 (integers from -7 to
7). With int4, a byte holds two codes: elements i and i + K/2 of a head.

Shapes: B batch, S cache slots, G key/value heads, K head width, N queries per key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.model.config import ModelConfig

BOUNDS = {"int8": 127.5, "fp8_e4m3": 448.0, "int4": 7.5}
"""Quotient of the largest absolute element of a head and the head's scale, by format. For integer formats, the quotient
is the largest code plus 0.5."""
STORED = {"int8": jnp.int8, "fp8_e4m3": jnp.float8_e4m3fn, "int4": jnp.uint8}
"""Dtype of the array of codes, by format."""
PER_BYTE = {"int8": 1, "fp8_e4m3": 1, "int4": 2}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Compressed:
    """Store the rotated keys or values of one layer as codes [..., S, K] and scales [..., S, 1].

    >>> kept = Compressed.of(rotated(jnp.array([[1.0, -0.5], [0.0, 3.0]])), "int8")
    >>> kept.codes.tolist(), kept.shape
    ([[127, -64], [0, 127]], (2, 2))
    """

    codes: jax.Array
    """Codes in the dtype `STORED[format]`; with int4, the last axis has K / 2 bytes."""
    scale: jax.Array
    """Scales of the codes. A negative scale marks a key from which the center was not subtracted."""
    format: str = field(metadata={"static": True})
    center: jax.Array | None = None
    """Vector that was subtracted from the rotated keys, float32 [..., 1, K]; None for values."""

    @classmethod
    def of(cls, x: jax.Array, form: str, center: jax.Array | None = None) -> Compressed:
        """Rotate and quantize keys or values [..., S, K], with one scale per row of K elements.

        Args:
            x: Keys or values. The scales get the same dtype.
            form: Format of the codes.
            center: Vector to subtract from rotated keys (`Compressed.center`), or None.
        """
        bound = BOUNDS[form]
        wide = rotated(x)
        largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        raw = jnp.zeros_like(largest, bool)
        if center is not None:
            moved = wide - center
            moved_largest = jnp.max(jnp.abs(moved), axis=-1, keepdims=True)
            raw = largest < moved_largest
            wide, largest = jnp.where(raw, wide, moved), jnp.where(raw, largest, moved_largest)
        scale = (largest / bound).astype(x.dtype)
        unit = wide / jnp.where(scale == 0, 1, scale).astype(jnp.float32)
        if center is not None:  # a key of zeros needs a negative scale too
            scale = jnp.where(raw, -jnp.maximum(scale, jnp.finfo(scale.dtype).tiny), scale)
        if form == "fp8_e4m3":  # a scale in bfloat16 may be rounded down, and larger floats would become NaN
            return cls(jnp.clip(unit, -bound, bound).astype(STORED[form]), scale, form, center)
        level = jnp.clip(jnp.round(unit), -bound + 0.5, bound - 0.5).astype(jnp.int8)
        if form == "int4":
            low, high = jnp.split(level.astype(jnp.uint8), 2, axis=-1)
            level = (low & 15) | (high << 4)
        return cls(level, scale, form, center)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], form: str, dtype: Any, centered: bool = False) -> Compressed:
        """Return zeros [..., S, K], with scales in `dtype`. If `centered` is set, the center is a zero vector."""
        codes = (*shape[:-1], shape[-1] // PER_BYTE[form])
        center = jnp.zeros((*shape[:-2], 1, shape[-1]), jnp.float32) if centered else None
        return cls(jnp.zeros(codes, STORED[form]), jnp.zeros((*shape[:-1], 1), dtype), form, center)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dequantized array."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * PER_BYTE[self.format])

    def with_heads(self, B: int, G: int) -> Compressed:
        """Return the same elements with all four axes [B, G, S, K]. In the cache, axes of size 1 are omitted."""
        return jax.tree.map(lambda a: a.reshape(B, G, *a.shape[-2:]), self)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the keys or values as a dense array: dequantized, with the center added, and rotated back."""
        levels = jnp.concatenate(self._levels(jnp.float32), axis=-1)
        wide = levels * jnp.abs(self.scale).astype(jnp.float32)
        if self.center is not None:
            wide += jnp.where(self.scale < 0, 0, self.center)
        return rotated(wide).astype(dtype)

    def key_product(self, q_BGNK: jax.Array) -> jax.Array:
        """Return queries @ transpose(keys), float32 [B, G, N, S], for queries [B, G, N, K].

        The keys are the elements of this object, [B, G, S, K].
        """
        levels = self._levels(q_BGNK.dtype)
        turned = rotated(q_BGNK)
        queries = jnp.split(turned.astype(q_BGNK.dtype), len(levels), axis=-1)
        found = sum(_product(q, k, 3, 3) for q, k in zip(queries, levels, strict=True))
        scale = self._scale_of_slots()
        if self.center is None:
            return found * scale
        return found * jnp.abs(scale) + jnp.where(scale < 0, 0, jnp.sum(turned * self.center, axis=-1, keepdims=True))

    def value_product(self, p_BGNS: jax.Array, dtype: Any) -> jax.Array:
        """Return p @ values, float32 [B, G, N, K], for probabilities p [B, G, N, S].

        The values are the elements of this object, [B, G, S, K]. The products are computed in `dtype`.
        """
        p_BGNS = (p_BGNS * self._scale_of_slots()).astype(dtype)
        return rotated(jnp.concatenate([_product(p_BGNS, v, 3, 2) for v in self._levels(dtype)], axis=-1))

    def _scale_of_slots(self) -> jax.Array:
        return jnp.swapaxes(self.scale, -1, -2).astype(jnp.float32)

    def _levels(self, dtype: Any) -> list[jax.Array]:
        """Return the codes as numbers in `dtype`, in a list of arrays.

        With int4, the list has two arrays: the first and the last K / 2 elements of each head. Otherwise, it has one.
        """
        if self.format != "int4":
            return [self.codes.astype(dtype)]
        signed = self.codes.astype(jnp.int8)
        return [((signed << 4) >> 4).astype(dtype), (signed >> 4).astype(dtype)]


def rotated(x: jax.Array) -> jax.Array:
    """Return x [..., K] in float32, multiplied by an orthogonal matrix [K, K] that is its own inverse.

    The matrix is block-diagonal. Each block is the same normalized Hadamard matrix. The size of a block is the largest
    power of 2 that divides K.
    """
    size = x.shape[-1] & -x.shape[-1]
    block = np.ones((1, 1), np.float32)
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, size)
    turned = jnp.matmul(parts, block / np.float32(size**0.5), precision=jax.lax.Precision.HIGHEST)
    return turned.reshape(x.shape)


def _product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Compute a matrix product in float32 that is batched over the axes B and G."""
    dims = (((contract_a,), (contract_b,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def check(form: str, cfg: ModelConfig) -> None:
    """Check that the keys and values of a model can be cached in a format.

    Raises:
        RequestError: If the format is int4 and heads have an odd width. int4 stores two elements per byte.
    """
    if form and cfg.head_dim % PER_BYTE[form]:
        raise RequestError(f"kv_cache {form}: stores two elements per byte, and heads have {cfg.head_dim}; use int8")
