"""Collect statistics of the inputs of a layer's matrices, as sums over the tokens of calibration data.

Shapes: N tokens of a batch, I inputs of a matrix, H blocks of K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp


class Statistic(Protocol):
    """Sum a function of a matrix's inputs over tokens. A statistic is a pytree of float32 arrays.

    >>> stat = Moments.start(2).fold(jnp.array([[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]]), jnp.array([True, True, False]))
    >>> stat.squares.tolist(), float(stat.count)
    ([10.0, 4.0], 2.0)
    """

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Self:
        """Return the statistic with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        ...

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the matrix."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["squares", "count"], meta_fields=[])
@dataclass(frozen=True)
class Moments:
    """Sum the squares [I] of a matrix's inputs, and count the tokens."""

    squares: jax.Array
    count: jax.Array

    @staticmethod
    def start(inputs: int) -> Moments:
        """Return the statistic before any tokens are added."""
        return Moments(jnp.zeros(inputs, jnp.float32), jnp.zeros((), jnp.float32))

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Moments:
        """Return the statistic with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        x_NI = jnp.where(real_N[:, None], x_NI.astype(jnp.float32), 0.0)
        return Moments(self.squares + jnp.sum(jnp.square(x_NI), axis=0), self.count + jnp.sum(real_N))

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the matrix."""
        return self.squares.size


@partial(jax.tree_util.register_dataclass, data_fields=["products", "count"], meta_fields=[])
@dataclass(frozen=True)
class Gram:
    """Sum the Gram matrices X^T X [H, K, K] for H blocks of a matrix's inputs, and count the tokens.

    With a single block of all inputs, the Gram matrix is the Hessian of the layer's squared error. With one block per
    head, the Gram matrices give the scores by which heads are pruned.
    """

    products: jax.Array
    count: jax.Array

    @staticmethod
    def start(inputs: int, blocks: int = 1) -> Gram:
        """Return the statistic before any tokens are added."""
        width = inputs // blocks
        return Gram(jnp.zeros((blocks, width, width), jnp.float32), jnp.zeros((), jnp.float32))

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Gram:
        """Return the statistic with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        x_NI = jnp.where(real_N[:, None], x_NI.astype(jnp.float32), 0.0)
        x_NHK = x_NI.reshape(x_NI.shape[0], self.products.shape[0], -1)
        # An inverse needs more than the products in bfloat16 or TF32 that TPUs and GPUs compute by default.
        products = jnp.einsum("nhk,nhl->hkl", x_NHK, x_NHK, precision=jax.lax.Precision.HIGHEST)
        return Gram(self.products + products, self.count + jnp.sum(real_N))

    @property
    def squares(self) -> jax.Array:
        """Return the sum of squares of each input, [I]: the diagonal of the Gram matrix."""
        return jnp.diagonal(self.products, axis1=1, axis2=2).reshape(-1)

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the matrix."""
        return self.products.shape[0] * self.products.shape[1]


@partial(jax.tree_util.register_dataclass, data_fields=["sums", "count"], meta_fields=["inputs"])
@dataclass(frozen=True)
class Norms:
    """Sum the Euclidean norms [H] of H blocks of a matrix's inputs over tokens, and count the tokens.

    If every block has a single input, the norms are absolute values.
    """

    sums: jax.Array
    count: jax.Array
    inputs: int

    @staticmethod
    def start(inputs: int, blocks: int) -> Norms:
        """Return the statistic before any tokens are added."""
        return Norms(jnp.zeros(blocks, jnp.float32), jnp.zeros((), jnp.float32), inputs)

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Norms:
        """Return the statistic with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        x_NI = jnp.where(real_N[:, None], x_NI.astype(jnp.float32), 0.0)
        norm_NH = jnp.linalg.norm(x_NI.reshape(x_NI.shape[0], self.sums.shape[0], -1), axis=-1)
        return Norms(self.sums + jnp.sum(norm_NH, axis=0), self.count + jnp.sum(real_N), self.inputs)


@partial(jax.tree_util.register_dataclass, data_fields=["sums"], meta_fields=[])
@dataclass(frozen=True)
class Totals:
    """Sum a matrix's inputs [I] over tokens."""

    sums: jax.Array

    @staticmethod
    def start(inputs: int) -> Totals:
        """Return the statistic before any tokens are added."""
        return Totals(jnp.zeros(inputs, jnp.float32))

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Totals:
        """Return the statistic with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        return Totals(self.sums + jnp.sum(jnp.where(real_N[:, None], x_NI.astype(jnp.float32), 0.0), axis=0))

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the matrix."""
        return self.sums.size


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclass(frozen=True)
class Joined:
    """Collect several statistics of the same inputs, by name."""

    parts: dict[str, Any]

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Joined:
        """Return the statistics with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        return Joined({name: part.fold(x_NI, real_N) for name, part in self.parts.items()})

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the matrix."""
        return next(iter(self.parts.values())).inputs


@partial(jax.tree_util.register_dataclass, data_fields=["peaks"], meta_fields=[])
@dataclass(frozen=True)
class Peaks:
    """Collect the largest absolute value of each input of a matrix, [I]."""

    peaks: jax.Array

    @staticmethod
    def start(inputs: int) -> Peaks:
        """Return the statistic before any tokens are added."""
        return Peaks(jnp.zeros(inputs, jnp.float32))

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Peaks:
        """Return the statistic with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        x_NI = jnp.where(real_N[:, None], jnp.abs(x_NI.astype(jnp.float32)), 0.0)
        return Peaks(jnp.maximum(self.peaks, jnp.max(x_NI, axis=0)))

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the matrix."""
        return self.peaks.shape[-1]


Stats = Mapping[str, Any]
"""Statistics of one layer, by path of the matrix ("attn/q", "mlp/down")."""


@partial(jax.tree_util.register_dataclass, data_fields=["of_inputs"], meta_fields=["first"])
@dataclass(frozen=True, eq=False)
class LayerStats(Mapping[str, Any]):
    """Map the path of each matrix of a layer to the statistic of its inputs.

    Matrices that read the same inputs, such as the query, key and value projections, share one statistic.

    >>> shared = LayerStats({"attn/k": Totals.start(2)}, (("attn/k", "attn/k"), ("attn/q", "attn/k")))
    >>> shared["attn/q"] is shared["attn/k"], len(jax.tree.leaves(shared))
    (True, 1)
    """

    of_inputs: dict[str, Any]
    """Stored statistics. The key is the path of one of the matrices that share the statistic."""
    first: tuple[tuple[str, str], ...]
    """Pairs (path of a matrix, key of its statistic in `of_inputs`), sorted."""

    def __getitem__(self, path: str) -> Any:
        """Return the statistic of the inputs of the matrix at `path`."""
        return self.of_inputs[dict(self.first)[path]]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths of the matrices."""
        return (path for path, _ in self.first)

    def __len__(self) -> int:
        """Return the number of matrices."""
        return len(self.first)

    def without(self, path: str) -> dict[str, Any]:
        """Return all stored statistics except the statistic of the matrix at `path`."""
        own = dict(self.first).get(path)
        return {first: stat for first, stat in self.of_inputs.items() if first != own}


Collect = Callable[[str, int], Statistic | None]
"""Function that selects the statistic of a matrix. Its arguments are the path of the matrix and the number of inputs.
It returns an empty statistic, or None to collect nothing. Matrices that read the same input share one statistic if the
function returns the same type and shapes for these matrices.
"""


def moments(path: str, inputs: int) -> Statistic:
    """Return empty Moments for every matrix, so that the sums of squares of its inputs are collected.

    This is a `Collect` function, an argument of `llmctl.compress.calibration.calibrate.walk`.
    """
    return Moments.start(inputs)


def grams(path: str, inputs: int) -> Statistic:
    """Return an empty Gram for every matrix, so that the Gram matrix of all its inputs is collected.

    This is a `Collect` function, an argument of `llmctl.compress.calibration.calibrate.walk`.
    """
    return Gram.start(inputs)


def nothing(path: str, inputs: int) -> None:
    """Return None for every matrix, so that no statistics are collected.

    This is a `Collect` function, an argument of `llmctl.compress.calibration.calibrate.walk`. The walk then measures
    only the block influence of the layers.
    """
