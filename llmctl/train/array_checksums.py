"""Compute checksums of arrays on their devices, to detect bits that changed between saving and restoring.

A checksum consists of two sums over the bits of all numbers, modulo 2^32. Each number is multiplied by an odd hash of
its position in the array. A change of a single number therefore always changes the checksum. Almost every change of
several numbers also changes the checksum. The checksum does not depend on the sharding or on the layout of the files.
To compute the checksum, each array is read once.

Example:
  >>> of_arrays({"w": jnp.arange(3.0)}) == of_arrays({"w": jnp.arange(3.0) + 0})
  True
  >>> of_arrays({"w": jnp.zeros(2)})
  {"['w']": [0, 0]}
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.distributed import host_arrays

FACTORS = (0x9E3779B1, 0x85EBCA77)
"""Odd factors for hashing the positions of numbers: one factor per sum."""


def of_arrays(tree: Any) -> dict[str, list[int]]:
    """Return the checksum of every array of a tree, by the array's path, as two integers.

    If a run has several processes, all processes must call this function.
    """
    named = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: [int(n) for n in host_arrays.read(sums)] for name, sums in _sums(named).items()}


@jax.jit
def _sums(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _sum(a) for name, a in named.items()}


def _sum(a: jax.Array) -> jax.Array:
    """Return the checksum of an array: two weighted sums over the bits of its numbers, uint32 [2]."""
    bits = _bits(a)
    strides = [math.prod(a.shape[axis + 1 :]) % 2**32 for axis in range(a.ndim)]
    steps = (jax.lax.broadcasted_iota(jnp.uint32, a.shape, i) * np.uint32(s) for i, s in enumerate(strides))
    position = functools.reduce(jnp.add, steps, jnp.zeros(a.shape, jnp.uint32))
    return jnp.stack([jnp.sum(bits * _weight(position, factor), dtype=jnp.uint32) for factor in FACTORS])


def _weight(position: jax.Array, factor: int) -> jax.Array:
    """Return an odd factor for the number at each position: a hash of the position, uint32 of the same shape.

    Factors that are linear in the position would not detect some swaps of two values.
    """
    mixed = position * np.uint32(factor)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x2C1B3C6D)
    return (mixed ^ (mixed >> 13)) | np.uint32(1)


def _bits(a: jax.Array) -> jax.Array:
    """Return the bits of each number of an array as uint32, in the array's shape."""
    if jnp.issubdtype(a.dtype, jnp.floating):
        a = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))
    return a.astype(jnp.uint32)
