"""Define weight nodes: objects in the parameter tree that store one weight as several arrays.

Examples are a quantized matrix, which consists of integers and scales, and a matrix with a LoRA adapter.

A node is a frozen dataclass that derives from `Node`. The arrays of a node are called parts, and the other fields are
called settings:

    >>> @node_type
    ... class Ternary(Node):
    ...     kind: ClassVar[str] = "ternary"
    ...     values_IO: jax.Array  # int8 [..., I, O]
    ...     scale: jax.Array  # float32 [..., 1, 1]
    ...     shape = property(lambda self: self.values_IO.shape)
    ...     dtype = property(lambda self: self.scale.dtype)
    ...     is_integer = property(lambda self: True)
    ...     def dense(self, dtype=jnp.float32):
    ...         return (self.values_IO * self.scale).astype(dtype)
    >>> w = Ternary(jnp.array([[1, 0], [-1, 1]], jnp.int8), jnp.full((1, 1), 0.5))
    >>> w.matmul(jnp.ones((3, 2)), jnp.float32, Product())[0].tolist(), w.count(), [*w.parts()]
    ([0.0, 0.5], 4, ['values_IO', 'scale'])

With the entry point `"weight.ternary" = "my_package:Ternary"`, llmctl can run, save, load, shard, merge and export this
node. By default, all methods use `dense`, which returns the weight as a plain array. A subclass overrides methods for
which a dense array is slow or impossible. A node that adds an adapter to another weight derives from
`llmctl.model.weights.adapter.Adapter`.

Limits: every array of a node must have as many axes as the weight. If the weight has a leading axis of layers, every
array must have this axis too. The reason is that `lax.scan` over layers slices the leading axis. Along another axis, an
array may be shorter than the weight (such as scales). The array is then replicated along this axis.

Shapes: N tokens (any number of leading axes), I inputs, O outputs, V vocabulary, D model width.
"""

from __future__ import annotations

import abc
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.base import with_article
from llmctl.config.errors import RequestError

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Product:
    """Store options for the product of activations and a weight. A weight node may ignore the options."""

    fold: bool = True
    """Whether to merge the leading axes of x into one axis before the product. Merged axes are much faster on XLA's CPU
    backend (see recipes/bench). The option must be false if devices shard several leading axes, because XLA would then
    gather x."""
    kind: str = ""
    """8-bit type of the product in training, "int8" or "fp8"; empty means none. Only plain arrays use this option."""
    axes: tuple[str, str] | None = None
    """Names of the matrix's axes in the sharding rules. The names determine how a matrix is gathered under FSDP."""


def setting(*, default: Any = MISSING) -> Any:
    """Declare a dataclass field of a weight node that is not an array, such as a group size.

    The value of the field is stored in the manifest, the JSON file that describes an artifact.
    """
    return field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(field, setting))
def node_type(cls: C) -> C:
    """Make a class a weight node: a frozen dataclass that JAX treats as a pytree of its array fields."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


class Node(abc.ABC):
    """Define the base class of weights that are stored as several arrays, such as integers and scales.

    All weights have the same methods, whatever the storage format.

    The module docstring has an example.
    """

    kind: ClassVar[str]
    """Name of the class in manifests (JSON files that describe artifacts) and in entry points, as in "weight.NAME"."""
    adapter_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays that adapter training changes; the other arrays of the node are frozen."""
    scale_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays with one number per group of the weight's elements, such as scales."""
    keeps_zeros: ClassVar[bool] = False
    """Whether zeros of the frozen base weight, such as pruned elements, stay zero when an adapter is merged."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return the shape that the weight has as one dense array, such as [layers, inputs, outputs]."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Return the dtype that the weight has as one dense array."""

    @property
    def ndim(self) -> int:
        """Return the number of axes of `shape`."""
        return len(self.shape)

    @abc.abstractmethod
    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as one dense array of the shape `shape`, in `dtype`."""

    # --- products ----------------------------------------------------------------------------------------------------

    def matmul(self, x: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x @ weight, [..., O], in `dtype`, for x [..., I]."""
        x = x.astype(dtype)
        x_NI = x.reshape(-1, x.shape[-1]) if options.fold else x
        return self.multiply(x_NI, dtype, options).reshape(*x.shape[:-1], self.shape[-1])

    def multiply(self, x_NI: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x_NI @ weight. `matmul` calls this method.

        `x_NI` and the result have the dtype `dtype`. If `options.fold` is true, `x_NI` is [N, I] and the result is
        [N, O]. Otherwise, `x_NI` is [..., I] and the result is [..., O].
        """
        return jnp.matmul(x_NI, self.dense(dtype))

    def transpose_matmul(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Return x @ transpose(table), [..., V], in `dtype`, for x [..., D] and this table [V, D].

        This is the product of a tied output projection.
        """
        x_ND = x.astype(dtype).reshape(-1, x.shape[-1])
        y_NV = jax.lax.dot_general(x_ND, self.dense(dtype), (((1,), (1,)), ((), ())))
        return y_NV.reshape(*x.shape[:-1], self.shape[0])

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows `ids` of this table [V, D], in `dtype`: an array [..., D].

        `axes` are the names of the table's axes in the sharding rules.
        """
        return jnp.take(self.dense(dtype), ids, axis=0)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return the same weight in the form that is fastest for decoding, on a CPU if `on_cpu` is true."""
        return self

    def bias(self, b: jax.Array, dtype: Any) -> jax.Array:
        """Return the bias of the dense layer that has this matrix, in `dtype`.

        `b` is the stored bias. If an adapter of the weight scales the bias, the result is the scaled bias.
        """
        return b.astype(dtype)

    # --- storage -----------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Return the stored arrays of the weight, by name."""
        return {name: getattr(self, name) for name in _names(self, static=False)}

    def settings(self) -> dict[str, Any]:
        """Return the fields that are not arrays, as JSON data for the manifest.

        Fields may not be called `node` or `parts`, because the manifest uses these keys.
        """
        return {name: getattr(self, name) for name in _names(self, static=True)}

    @classmethod
    def restore(cls, settings: dict[str, Any], parts: dict[str, Any]) -> Self:
        """Build a node from the results of `settings` and `parts`. The arrays may be abstract."""
        return cls(**{name: settings[name] for name in _names(cls, static=True) if name in settings}, **parts)

    def misfit(self) -> str:
        """Return the name of an array whose shape does not fit the shape of the weight; "" if all arrays fit.

        Along inputs and outputs, the length of the weight must be a multiple of the length of its scales. The other
        axes, such as layers, must have equal lengths.
        """
        parts = self.parts()
        for name in self.scale_parts:
            shape = parts[name].shape if name in parts else self.shape
            if len(shape) != self.ndim or shape[:-2] != self.shape[:-2]:
                return name
            if any(not n or size % n for size, n in zip(self.shape, shape, strict=True)):
                return name
        return ""

    def count(self) -> int:
        """Return the number of parameters: the elements of the dense weight, plus any parameters of an adapter."""
        return math.prod(self.shape)

    # --- what training and compression ask ---------------------------------------------------------------------------

    @property
    def values_part(self) -> str | None:
        """Return the name of a stored array that has the same zeros as the dense weight.

        For a quantized weight, the result is the name of the integers. The result is None if no array has this
        property.
        """
        return None

    def values(self) -> Any:
        """Return an array of the shape `shape` that has the same zeros as the weight.

        For a quantized weight, the result is the array of integers. By default, the result is the dense weight.
        """
        return self.dense() if self.values_part is None else self.parts()[self.values_part]

    @property
    def is_integer(self) -> bool:
        """Return True if the weight is stored as integers. Training cannot change integers."""
        return False

    @property
    def format_name(self) -> str:
        """Return the name of the format in which the weight is stored, for messages, such as int4 or nf4."""
        return self.kind

    @property
    def has_adapter(self) -> bool:
        """Return True if the weight has an adapter that is not merged."""
        return False

    @property
    def scales_bias(self) -> bool:
        """Return True if the weight has an adapter that also changes the layer's bias."""
        return False

    def bare(self) -> Any:
        """Return the weight without its adapter."""
        return self

    def with_base(self, base: Any) -> Any:
        """Return the weight `base` with the adapter of this weight. `base` must have the shape of this weight.

        Raises:
            TypeError: If this weight has no adapter.
        """
        raise TypeError(f"{type(self).__name__} has no adapter")

    def merged(self) -> Any:
        """Return the weight with its adapter merged, in the dtype of the frozen base weight.

        If there is no adapter, return the weight unchanged.
        """
        return self

    def quantized(self) -> Any:
        """Return the weight as a `Quantized` of integers or 8-bit floats; None if the weight is stored otherwise."""
        return None

    def integers(self) -> Any:
        """Return the weight as a `Quantized` of integers, for export formats; None if the weight has no such form."""
        return None

    def with_activations(self, kind: str, input_scale: jax.Array | None = None) -> Any:
        """Return the same weight with activations (its inputs) quantized to `kind`, such as int8.

        The inputs are quantized before each product, with the scale `input_scale`. If `input_scale` is None, each token
        has a scale.

        Raises:
            RequestError: If this kind of weight does not support quantized activations.
        """
        raise RequestError(f"{with_article(self.kind)} weight cannot quantize its activations to {kind}")

    def without_activations(self) -> Any:
        """Return the same weight without quantization of activations (its inputs)."""
        return self

    def masked(self, mask: jax.Array) -> Any:
        """Return the weight with zeros at the False entries of the mask. The mask is broadcast to the shape of the
        weight.

        Raises:
            RequestError: If this kind of weight cannot store zeros.
        """
        raise RequestError(f"{with_article(self.kind)} weight cannot be pruned; prune before it is made")

    def select(self, index_LN: np.ndarray, axis: int) -> Any:
        """Return a weight [layers, inputs, outputs] with only the selected inputs or outputs of each layer.

        Args:
            index_LN: Indices of the N selected inputs or outputs in each of L layers.
            axis: -1 to select outputs, -2 to select inputs.

        Raises:
            RequestError: If the weight is quantized with one scale per group along this axis, because the selection
                would break up groups. The message does not contain the name of the weight.
        """
        return jax.tree.map(lambda a: take_along(a, index_LN, axis, self.shape[axis]), self)


def take_along(a: jax.Array, index_LN: np.ndarray, axis: int, full: int) -> jax.Array:
    """Return one array of a weight, such as its scales, with only the selected indices along `axis`.

    An array of length 1 along this axis is returned unchanged, because it applies to all indices.

    Args:
        a: The array, with a leading axis of layers.
        index_LN: The N selected indices in each of L layers.
        axis: Axis along which to select.
        full: Length of the dense weight along this axis.

    Raises:
        RequestError: If the array has several elements along this axis, but fewer than the weight. An example is one
            scale per group of inputs.
    """
    if a.shape[axis] == 1 and full > 1:
        return a
    if a.shape[axis] != full:
        raise RequestError(
            f"is quantized in groups of {full // a.shape[axis]} along what would be cut; "
            "prune first and quantize then, or quantize with group 0"
        )
    shape = [1] * a.ndim
    shape[0], shape[axis] = index_LN.shape
    return jnp.take_along_axis(a, jnp.asarray(index_LN).reshape(shape), axis=axis)


def _names(cls: Any, static: bool) -> list[str]:
    """Return the names of a weight node's array fields or, if `static`, of its other fields."""
    return [f.name for f in fields(cls) if bool(f.metadata.get("static")) is static]
