"""Compute the size of abstract arrays in bytes."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np


def bytes_of(tree: Any, whole: bool = False) -> int:
    """Return the size of a tree of arrays in bytes.

    Args:
        tree: Arrays or abstract arrays.
        whole: Whether to count all elements of each array. By default, only the shard of one device is counted.
    """
    total = 0
    for a in jax.tree.leaves(tree):
        shape = a.shape if whole or a.sharding is None else a.sharding.shard_shape(a.shape)
        bits = 4 if str(a.dtype) in ("int4", "uint4") else 8 * np.dtype(a.dtype).itemsize
        total += math.prod(shape) * bits // 8
    return total
