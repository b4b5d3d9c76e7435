"""Define weight nodes: leaves of the parameter tree that store one weight as several arrays.

A node is a frozen dataclass that derives from `Node`. Its array fields are its parts, its other fields its settings:

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
node. By default, all methods use `dense`. A subclass overrides methods for which that is slow or impossible. A node
around another weight derives from `llmctl.model.weights.adapter.Adapter`.

Limits: every part must have as many axes as the weight, and must begin with its leading axes (layers). Scans over
layers and sharding rules need these axes. If a part is shorter than the weight along a dimension, it is replicated
along this dimension.

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
    """Store options that the caller of a matrix product chooses. A node may ignore them."""

    fold: bool = True
    """Whether to merge the leading axes of x into one before the product, which is much faster on XLA's CPU backend
    (see recipes/bench). It must be false if devices shard several leading axes, because XLA would then gather x."""
    kind: str = ""
    """8-bit type of the product in training, a name in `quantized_matmul.TYPES`; empty means none. Only plain arrays
    use it."""
    axes: tuple[str, str] | None = None
    """Logical axes of the matrix. If it is a plain array that FSDP shards, they determine how it is gathered."""


def setting(*, default: Any = MISSING) -> Any:
    """Declare a dataclass field of a node that is not an array. Its value is stored in the manifest."""
    return field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(field, setting))
def node_type(cls: C) -> C:
    """Register a class as a weight node: a frozen dataclass, and a pytree whose leaves are its parts."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


class Node(abc.ABC):
    """Represent one weight of the parameter tree, independent of its storage format.

    The module docstring has an example.
    """

    kind: ClassVar[str]
    """Name of the class in manifests and in the registry `weight`."""
    adapter_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that are trained in an adapter method; the other parts are frozen."""
    keeps_zeros: ClassVar[bool] = False
    """Whether the merged weight of an adapter is zero wherever the base is zero."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape, as the model config defines it. Leading axes are layers."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Return the dtype that the weight has as a plain array."""

    @property
    def ndim(self) -> int:
        """Return the number of logical axes."""
        return len(self.shape)

    @abc.abstractmethod
    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the weight as a plain array of its logical shape."""

    # --- products ----------------------------------------------------------------------------------------------------

    def matmul(self, x: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x [..., I] times the weight [I, O] in `dtype`, an array [..., O]."""
        x = x.astype(dtype)
        x_NI = x.reshape(-1, x.shape[-1]) if options.fold else x
        return self.multiply(x_NI, dtype, options).reshape(*x.shape[:-1], self.shape[-1])

    def multiply(self, x_NI: jax.Array, dtype: Any, options: Product) -> jax.Array:
        """Return x_NI times the weight in `dtype`, an array [N, O]. `matmul` calls this method.

        `x_NI` has the dtype `dtype`. It has the shape [N, I] if `options.fold` is true, otherwise [..., I].
        """
        return jnp.matmul(x_NI, self.dense(dtype))

    def transpose_matmul(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Return x [..., D] times the transpose of this table [V, D] in `dtype`, an array [..., V].

        This is the product of a tied output projection.
        """
        x_ND = x.astype(dtype).reshape(-1, x.shape[-1])
        y_NV = jax.lax.dot_general(x_ND, self.dense(dtype), (((1,), (1,)), ((), ())))
        return y_NV.reshape(*x.shape[:-1], self.shape[0])

    def take(self, ids: jax.Array, dtype: Any, axes: tuple[str | None, str] | None = None) -> jax.Array:
        """Return the rows of this table [V, D] at ids [...] in `dtype`, an array [..., D].

        `axes` are the table's logical axes.
        """
        return jnp.take(self.dense(dtype), ids, axis=0)

    def for_decoding(self, on_cpu: bool) -> Any:
        """Return the same weight in the form that is fastest for decoding."""
        return self

    def bias(self, b: jax.Array, dtype: Any) -> jax.Array:
        """Return the bias of the layer that this matrix belongs to, in `dtype`.

        It is the stored bias `b`, if no adapter scales it.
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
        """Return the node that has the given settings and parts; the inverse of `settings` and `parts`.

        Parts may be abstract.
        """
        return cls(**{name: settings[name] for name in _names(cls, static=True) if name in settings}, **parts)

    def count(self) -> int:
        """Return the number of parameters: elements of the logical shape and, for an adapter, those that it adds."""
        return math.prod(self.shape)

    # --- what training and compression ask ---------------------------------------------------------------------------

    @property
    def values_part(self) -> str | None:
        """Return the name of the array of this node that shows which elements of the weight are zero.

        That array has the shape of the dense weight, for example the integers of a quantized weight. Return None if
        the node has no such array.
        """
        return None

    def values(self) -> Any:
        """Return an array of the logical shape that is zero exactly where the stored weight is zero."""
        return self.dense() if self.values_part is None else self.parts()[self.values_part]

    @property
    def is_integer(self) -> bool:
        """Return True if the weight is stored as integers. Training cannot change integers."""
        return False

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
        """Return the adapter of this weight over another weight of the same shape.

        Raises:
            TypeError: If this weight has no adapter.
        """
        raise TypeError(f"{type(self).__name__} has no adapter")

    def merged(self) -> Any:
        """Return the weight with its adapter merged, in the dtype of its base.

        Without an adapter, return the weight itself.
        """
        return self

    def integers(self) -> Any:
        """Return the weight as a `Quantized` for export formats that store integers, or None if it is not quantized."""
        return None

    def with_activations(self, kind: str) -> Any:
        """Return the same weight, but with products that quantize activations to `kind` (int8), one scale per token.

        Raises:
            RequestError: If this kind of weight does not support it.
        """
        raise RequestError(f"{with_article(self.kind)} weight cannot quantize its activations to {kind}")

    def without_activations(self) -> Any:
        """Return the same weight, but with products that do not quantize activations, as for a dense export."""
        return self

    def masked(self, mask: jax.Array) -> Any:
        """Return the weight with zeros where the mask is False. The mask is broadcast to the logical shape.

        Raises:
            RequestError: If this kind of weight cannot store zeros.
        """
        raise RequestError(f"{with_article(self.kind)} weight cannot be pruned; prune before it is made")

    def select(self, index_LN: np.ndarray, axis: int) -> Any:
        """Return a stacked weight with only the selected channels of each layer.

        Args:
            index_LN: Indices of the selected channels, per layer.
            axis: Axis of the channels: -1 for outputs, -2 for inputs.

        Raises:
            RequestError: If an element of a part belongs to several channels, such as the scale of a group. The caller
                adds the path of the weight to the message.
        """
        return jax.tree.map(lambda a: take_along(a, index_LN, axis, self.shape[axis]), self)


def take_along(a: jax.Array, index_LN: np.ndarray, axis: int, full: int) -> jax.Array:
    """Return one part of a weight with only the selected channels along `axis`.

    A part of length 1 along this axis belongs to all channels and is returned unchanged.

    Args:
        a: The part.
        index_LN: Indices of the selected channels, per layer.
        axis: Axis of the channels.
        full: Number of channels of the weight.

    Raises:
        RequestError: If an element of the part belongs to several channels.
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
    """Return the names of a node's settings (if `static`), or of its array fields."""
    return [f.name for f in fields(cls) if bool(f.metadata.get("static")) is static]
