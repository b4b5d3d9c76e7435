"""Store a weight as codes of 2, 3 or 4 bits that are packed into bytes. Each block of inputs has a scale.

A value is level * scale * factor. Each code has a level, each block has a scale, and each matrix has a factor. The
formats:

- int2, int3: integers from -2 to 1 and from -4 to 3, and scales in the dtype of the matrix. Blocks may have zero
  points, which are subtracted from the integers.
- mxfp4: floats of 4 bits (e2m1), and powers of two as scales (e8m0), as in the OCP Microscaling specification.
- nvfp4: floats of 4 bits (e2m1), scales in float8_e4m3fn, and a float32 factor of the matrix.

Shapes: I inputs, O outputs, G blocks of inputs, P bytes of an output's codes, V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.model.weights.base import Node, node_type, setting

FLOATS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes of e2m1. Bit 3 of a code is the sign."""
BITS = {"int2": 2, "int3": 3, "mxfp4": 4, "nvfp4": 4}
"""Map from format to the number of bits per code."""
PER_WORD = {2: (4, 1), 3: (8, 3), 4: (2, 1)}
"""Map from bits per code to (number of codes, number of bytes) of the smallest unit that is packed."""
BIAS = 127
"""Exponent bias of the scales of mxfp4: the scale 2^n is stored as the integer n + 127."""


@node_type
class Packed(Node):
    """Store a matrix [..., I, O] as bytes [..., P, O] and scales [..., G, O].

    A table [V, D] is packed along its last axis.

    >>> unit = jnp.array([[1.0], [-2.0], [0.0], [-1.0]])
    >>> Packed.of("int2", unit, jnp.full((1, 1), 0.5), jnp.ones((1, 1))).dense()[:, 0].tolist()
    [0.5, -1.0, 0.0, -0.5]
    """

    kind: ClassVar[str] = "packed"
    scale_parts: ClassVar[tuple[str, ...]] = ("scale", "zero")

    codes: jax.Array
    """Packed codes, uint8. The first code of a byte is in its lowest bits; integers are in two's complement."""
    scale: jax.Array
    """Scale of each block. For mxfp4, the scale 2^n is stored as n + 127, uint8."""
    whole: jax.Array
    """Factor by which all scales of a matrix are multiplied, [..., 1, 1]; 1 except for nvfp4."""
    format: str = setting()
    """Name of the format: int2, int3, mxfp4 or nvfp4."""
    size: int = setting()
    """Length of the dense weight along the packed axis."""
    axis: int = setting(default=-2)
    """Axis along which codes are packed into bytes: -2 for a matrix, -1 for a table."""
    zero: jax.Array | None = None
    """Integer that represents the value 0 in each block, int4; None means 0. Only integer formats have such zero
    points."""

    dtype = property(lambda self: self.whole.dtype)
    is_integer = property(lambda self: True)
    format_name = property(lambda self: self.format)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""
        shape = list(self.codes.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @classmethod
    def of(
        cls, name: str, level_IO: jax.Array, scale_GO: jax.Array, whole: jax.Array, zero_GO: jax.Array | None = None
    ) -> Packed:
        """Pack a matrix [I, O].

        Args:
            name: Name of the format.
            level_IO: Elements of the matrix, divided by their scales. The format must represent each value exactly.
            scale_GO: Scales, in the dtype in which they are stored. Exception: for mxfp4, powers of two in float32,
                whose exponents are then stored as uint8.
            whole: Factor by which all scales are multiplied, [1, 1].
            zero_GO: Zero points of integers, int4; None if the values are symmetric around 0.
        """
        if name == "mxfp4":
            scale_GO = exponent(scale_GO)
        return cls(pack(codes(name, level_IO), BITS[name], 0), scale_GO, whole, name, len(level_IO), zero=zero_GO)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        return self._values(self.codes, self.scale, self.zero).astype(dtype)

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of this table, [..., D], in `dtype`. Only these rows are dequantized."""
        rows = jax.tree.map(lambda a: jnp.take(a, ids, axis=0), (self.codes, self.scale, self.zero))
        return self._values(*rows).astype(dtype)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return a plain array if `on_cpu` is true, because a CPU would unpack the codes again for every token.
        Otherwise, return this weight unchanged."""
        return self.dense() if on_cpu else self

    def masked(self, mask: jax.Array) -> Packed:
        """Return the weight with zeros at the False entries of the mask. Other codes, and all scales, are unchanged."""
        found = unpack(self.codes, BITS[self.format], self.size, self.axis)
        zero = jnp.zeros((), jnp.uint8)
        if self.zero is not None:
            zero = codes(self.format, jnp.repeat(self.zero, self.size // self.zero.shape[self.axis], axis=self.axis))
        found = jnp.where(mask, found, zero)
        return replace(self, codes=pack(found, BITS[self.format], self.axis))

    def select(self, index_LN: np.ndarray, axis: int) -> Any:
        """Return a weight [layers, inputs, outputs] with only the selected outputs of each layer.

        Raises:
            RequestError: If inputs are selected, because the codes of several inputs are in one byte.
        """
        if axis == self.axis:
            raise RequestError(f"is packed {self.format} along what would be cut; prune first and quantize then")
        return super().select(index_LN, axis)

    def parts(self) -> dict[str, Any]:
        """Return the stored arrays of the weight, by name."""
        return {name: part for name, part in super().parts().items() if part is not None}

    def misfit(self) -> str:
        """Return the name of an array whose shape does not fit the shape of the weight; "" if all arrays fit."""
        number, size = PER_WORD[BITS[self.format]]
        return super().misfit() if self.codes.shape[self.axis] == -(-self.size // number) * size else "codes"

    def _values(self, packed: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        level = levels(self.format, unpack(packed, BITS[self.format], self.size, self.axis))
        if zero is not None:
            zero = zero.astype(jnp.float32)
            level -= jnp.repeat(zero, self.size // zero.shape[self.axis], axis=self.axis)
        if self.format == "mxfp4":
            scale = power(scale)
        scale = scale.astype(jnp.float32) * self.whole.astype(jnp.float32)
        return level * jnp.repeat(scale, self.size // scale.shape[self.axis], axis=self.axis)


def codes(name: str, level: jax.Array) -> jax.Array:
    """Encode levels of the format `name` as codes, uint8. A level is an element divided by its scale.

    Formats of floats keep the sign of zeros.
    """
    if name.startswith("int"):
        return (level.astype(jnp.int32) & (2 ** BITS[name] - 1)).astype(jnp.uint8)
    size = jnp.abs(level)
    found = jnp.zeros(level.shape, jnp.uint8)
    for low in FLOATS[:-1]:
        found += (size > low).astype(jnp.uint8)
    return found | (jnp.signbit(level).astype(jnp.uint8) << 3)


def levels(name: str, code: jax.Array) -> jax.Array:
    """Decode codes of the format `name` to levels, float32; inverse of `codes`.

    A level is an element divided by its scale.
    """
    if name.startswith("int"):
        half = 2 ** (BITS[name] - 1)
        return ((code.astype(jnp.int32) ^ half) - half).astype(jnp.float32)
    level: list[Any] = [jnp.float32(value) for value in FLOATS]
    for bit in range(3):  # selections are vectorized, and a lookup by index is not
        is_set = (code >> bit) & 1 == 1
        level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return jnp.where(code >> 3 == 1, -level[0], level[0])


def exponent(scale: jax.Array) -> jax.Array:
    """Encode scales 2^n as the integers n + 127, uint8."""
    return (jnp.frexp(scale)[1] - 1 + BIAS).astype(jnp.uint8)


def power(stored: jax.Array) -> jax.Array:
    """Decode the integers n + 127 to scales 2^n, float32; inverse of `exponent`.

    The bits of the floats are set directly, because the exponential function of XLA is not exact.
    """
    return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 23, jnp.float32)


def pack(code: jax.Array, bits: int, axis: int) -> jax.Array:
    """Pack codes of `bits` bits into bytes along an axis. The last byte is padded with zeros.

    >>> pack(jnp.array([1, 2, 3, 0, 1], jnp.uint8), 2, 0).tolist()
    [57, 1]
    """
    number, size = PER_WORD[bits]
    code = jnp.moveaxis(code, axis, -1).astype(jnp.uint32)
    code = jnp.pad(code, [(0, 0)] * (code.ndim - 1) + [(0, -code.shape[-1] % number)])
    shifts = bits * jnp.arange(number, dtype=jnp.uint32)
    word = jnp.sum(code.reshape(*code.shape[:-1], -1, number) << shifts, axis=-1, dtype=jnp.uint32)
    split = (word[..., None] >> (8 * jnp.arange(size, dtype=jnp.uint32))) & 255
    return jnp.moveaxis(split.reshape(*word.shape[:-1], -1).astype(jnp.uint8), -1, axis)


def unpack(packed: jax.Array, bits: int, length: int, axis: int) -> jax.Array:
    """Unpack the first `length` codes along an axis, uint8; inverse of `pack`."""
    number, size = PER_WORD[bits]
    parts = jnp.moveaxis(packed, axis, -1).astype(jnp.uint32)
    parts = parts.reshape(*parts.shape[:-1], -1, size)
    word = jnp.sum(parts << (8 * jnp.arange(size, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
    code = (word[..., None] >> (bits * jnp.arange(number, dtype=jnp.uint32))) & (2**bits - 1)
    code = code.reshape(*word.shape[:-1], -1)[..., :length]
    return jnp.moveaxis(code.astype(jnp.uint8), -1, axis)
