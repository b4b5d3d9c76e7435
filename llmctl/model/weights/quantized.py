"""Store a weight as integers or 8-bit floats, with scales.

Each output channel has one scale, or one scale per group of inputs. Integers may have zero points, one per scale.

Shapes: N tokens, I inputs, O outputs, G groups, V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import qwix

from llmctl.model.weights.base import Node, Product, node_type, setting

ACTIVATIONS = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn"}
"""Map from names in settings to the dtype of quantized activations."""
LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0}
"""Quotient of the largest absolute activation and the static scale of activations, by type. For int8, the quotient is
127, not 127.5. With 127.5, the last bit of a division would decide how the largest activation is rounded."""

FEW_TOKENS = 64
"""Maximum number of tokens per product for which groups are multiplied one by one. With more tokens, dequantizing the
weight is faster. The products of all groups would then also need more memory than the weight."""


@node_type
class Quantized(Node):
    """Store a weight as integers or 8-bit floats, with scales.

    An element of the weight is (number - zero point) * scale. Without zero points, an element is number * scale.

    If `activations` is "int8" or "fp8_e4m3", the inputs are also quantized before each product (W8A8). "fp8_e4m3"
    stands for 8-bit floats. The scale of the inputs is `input_scale`. If `input_scale` is None, each token has a scale.
    """

    kind: ClassVar[str] = "quantized"
    scale_parts: ClassVar[tuple[str, ...]] = ("scale", "zero", "input_scale")

    array: qwix.QArray
    activations: str = setting(default="")
    input_scale: jax.Array | None = None
    """Scale of all inputs of the matrix, [..., 1, 1] float32 (static quantization)."""

    shape = property(lambda self: self.array.qvalue.shape)
    dtype = property(lambda self: self.array.scale.dtype)
    values_part = property(lambda self: "qvalue" if self.array.zero_point is None else None)
    is_integer = property(lambda self: True)
    format_name = property(lambda self: str(self.array.qvalue.dtype))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""
        return qwix.dequantize(self.array).astype(dtype)

    def multiply(self, x_NI: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x_NI @ weight, [N, O], in `dtype`."""
        if self.activations:
            last = x_NI.ndim - 1
            return qwix.dot_general(self._rounded(x_NI), self.array, (((last,), (0,)), ((), ()))).astype(dtype)
        if self.array.scale.shape[0] == 1:  # per output channel: scaling the product is cheaper than scaling the weight
            return jnp.matmul(x_NI, self._unit(dtype)) * self.array.scale.astype(dtype)
        if options.fold and len(x_NI) <= FEW_TOKENS and self.array.zero_point is None:
            return self._multiply_by_group(x_NI, dtype)
        return jnp.matmul(x_NI, self.dense(dtype))

    def _multiply_by_group(self, x_NI: jax.Array, dtype: Any) -> jax.Array:
        """Return x_NI @ weight in `dtype`, computed as one product per group of inputs. The sums are then scaled.

        A TPU scales N * G * O sums faster than the I * O elements of the weight. The rows are padded to a multiple of
        8, because a TPU multiplies fewer rows without its matrix unit.
        """
        (N, I), O, G = x_NI.shape, self.shape[-1], self.array.scale.shape[0]
        x_NGI = jnp.pad(x_NI, ((0, -N % 8), (0, 0))).reshape(-1, G, I // G)
        unit_GIO = self.array.qvalue.reshape(G, I // G, O).astype(dtype)
        sums_GNO = jnp.einsum("ngi,gio->gno", x_NGI, unit_GIO, preferred_element_type=jnp.float32)
        return jnp.sum(sums_GNO * self.array.scale.astype(jnp.float32)[:, None], axis=0)[:N].astype(dtype)

    def _rounded(self, x_NI: jax.Array) -> qwix.QArray:
        """Return the inputs x_NI as 8-bit numbers with scales."""
        kind = ACTIVATIONS[self.activations]
        if self.input_scale is not None:
            scale = self.input_scale.reshape((1,) * x_NI.ndim)
            unit_NI = x_NI.astype(jnp.float32) / scale
            if self.activations == "int8":
                unit_NI = jnp.round(unit_NI)
            unit_NI = jnp.clip(unit_NI, -LARGEST[self.activations], LARGEST[self.activations])
            return qwix.QArray(unit_NI.astype(kind), scale, qtype=jnp.dtype(kind))
        # One scale per token; grouped weights need the same groups on the activation.
        groups, last = self.array.scale.shape[0], x_NI.ndim - 1
        tiles = {last: x_NI.shape[last] // groups} if groups > 1 else None
        return qwix.quantize(x_NI, kind, channelwise_axes=list(range(last)), tiled_axes=tiles)

    def _unit(self, dtype: Any) -> jax.Array:
        """Return the weight without its scales, in `dtype`. Call this method only if there is one scale per output."""
        unit = self.array.qvalue.astype(dtype)
        return unit if self.array.zero_point is None else unit - self.array.zero_point.astype(dtype)

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of this table, [..., D], in `dtype`. Only these rows are dequantized."""
        q_ND = jnp.take(self.array.qvalue, ids, axis=0).astype(dtype)

        def spread(parts: jax.Array) -> jax.Array:
            part_NG = (
                jnp.take(parts, ids, axis=0)
                if parts.shape[0] > 1
                else jnp.broadcast_to(parts[0], (*ids.shape, parts.shape[1]))
            )
            return jnp.repeat(part_NG.astype(dtype), q_ND.shape[-1] // part_NG.shape[-1], axis=-1)

        if self.array.zero_point is not None:
            q_ND -= spread(self.array.zero_point)
        return (q_ND * spread(self.array.scale)).astype(dtype)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return a plain array if `on_cpu` is true, because a CPU would convert the integers again for every token.

        Otherwise, return this weight unchanged. If the inputs are also quantized, the weight is always returned
        unchanged, because a plain array would give other results.
        """
        return self.dense() if on_cpu and not self.activations else self

    def parts(self) -> dict[str, Any]:
        """Return the integers ("qvalue") and their scales ("scale").

        If there are zero points ("zero") or a scale of the inputs ("input_scale"), return these arrays too.
        """
        found = {"qvalue": self.array.qvalue, "scale": self.array.scale, "zero": self.array.zero_point}
        found["input_scale"] = self.input_scale
        return {name: part for name, part in found.items() if part is not None}

    @classmethod
    def restore(cls, settings: dict[str, Any], parts: dict[str, Any]) -> Self:
        """Build a quantized weight from its settings and its stored arrays."""
        array = qwix.QArray(parts["qvalue"], parts["scale"], parts.get("zero"), qtype=parts["qvalue"].dtype)
        return cls(array, settings["activations"], parts.get("input_scale"))

    def misfit(self) -> str:
        """Return the name of an array whose shape does not fit the shape of the weight; "" if all arrays fit."""
        zero, inputs = self.array.zero_point, self.input_scale
        if inputs is not None and inputs.shape[-2:] != (1, 1):
            return "input_scale"
        return "zero" if zero is not None and zero.shape != self.array.scale.shape else super().misfit()

    def quantized(self) -> Quantized:
        """Return this weight."""
        return self

    def integers(self) -> Quantized | None:
        """Return this weight if it stores integers, otherwise None.

        Export formats store integers and scales. None means that this weight has no integers to export.
        """
        return self if jnp.issubdtype(self.array.qvalue.dtype, jnp.integer) else None

    def with_activations(self, kind: str, input_scale: jax.Array | None = None) -> Quantized:
        """Return the same weight with activations (its inputs) quantized to `kind`.

        The inputs are quantized before each product, with the scale `input_scale`. If `input_scale` is None, each token
        has a scale. `kind` must be "int8" for a weight of integers, and "fp8_e4m3" for a weight in float8_e4m3fn.

        Raises:
            RequestError: If `kind` does not fit the stored numbers, or if the weight has zero points.
        """
        own = self.integers() is not None if kind == "int8" else self.format_name == ACTIVATIONS[kind]
        if not own or self.array.zero_point is not None:
            return super().with_activations(kind)
        return replace(self, activations=kind, input_scale=input_scale)

    def without_activations(self) -> Quantized:
        """Return the same weight without quantization of activations (its inputs)."""
        return replace(self, activations="", input_scale=None)

    def masked(self, mask: jax.Array) -> Quantized:
        """Return the weight with zeros at the False entries of the mask.

        Other integers, and all scales, are unchanged.
        """
        zero = jnp.zeros((), self.array.qvalue.dtype)
        if self.array.zero_point is not None:
            zero = self.array.zero_point
            for axis, size in enumerate(self.shape):
                zero = jnp.repeat(zero, size // zero.shape[axis], axis=axis)
        return replace(self, array=replace(self.array, qvalue=jnp.where(mask, self.array.qvalue, zero)))
