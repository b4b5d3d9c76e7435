"""Transfer arrays between the host and devices, including devices of other processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmctl.distributed import processes

PIECE = 1 << 28
"""Approximate size in bytes of each part that `pieces` yields."""


def put(a: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shard a host array over the devices of `sharding`. The array must be equal in every process."""
    if processes.count() == 1:
        return jax.device_put(a, sharding)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


def read(a: jax.Array) -> np.ndarray:
    """Return the full array as a host array in every process. All processes must call this function."""
    found = list(pieces(a))
    return found[0] if len(found) == 1 else np.concatenate(found)


def pieces(a: jax.Array) -> Iterator[np.ndarray]:
    """Yield the full array in every process, as successive host arrays along its first axis.

    All processes must call this function. If all shards of the array are on devices of this process, the array is
    yielded as one piece. An array that is sharded over processes is gathered in parts of about `PIECE` bytes, to limit
    memory.
    """
    if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
        yield np.asarray(a)
        return
    mesh = a.sharding.mesh if isinstance(a.sharding, NamedSharding) else None
    assert mesh is not None, a.sharding
    rows = max(1, PIECE * a.shape[0] // max(a.nbytes, 1))
    whole = NamedSharding(mesh, PartitionSpec())
    for start in range(0, a.shape[0], rows):
        length = min(rows, a.shape[0] - start)
        yield np.asarray(_gather(length, whole)(a, start))


@cache
def _gather(length: int, whole: NamedSharding) -> Any:
    """Return a jitted function that selects `length` consecutive rows of an array.

    The function's arguments are the array and the index of the first row. The result is replicated on all devices, by
    the sharding `whole`.
    """
    return jax.jit(partial(jax.lax.dynamic_slice_in_dim, slice_size=length), out_shardings=whole)
