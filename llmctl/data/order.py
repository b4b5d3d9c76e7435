"""Orders that are a pure function of (seed, epoch) on every machine and every NumPy version.

NumPy keeps its bit generators stable but not what `Generator.permutation` makes of them, and a resumed run may
meet another version; so the order is an argsort of hashed indices.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finalizer (Steele, Lea, Flood 2014): uint64 to well-mixed uint64, one to one."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(n: int | np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A uint64 for every index below n (or in array n), independent for every (seed, epoch)."""
    i = np.arange(n, dtype=np.uint64) if isinstance(n, int) else n.astype(np.uint64)
    with np.errstate(over="ignore"):
        key = mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
        key = mix(key + np.array([epoch % 2**64], np.uint64) * _GOLDEN)
        return mix((i + np.uint64(1)) * _GOLDEN ^ key)


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below n, int64, shuffled."""
    return np.argsort(hashed(n, seed, epoch), kind="stable").astype(np.int64)
