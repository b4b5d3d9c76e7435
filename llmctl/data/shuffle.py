"""Compute pseudo-random permutations that are the same on every machine and with every NumPy version.

A resumed run may use another version of NumPy, whose `Generator.permutation` may give another result. Each permutation
is therefore the argsort of hashed indices.
"""

from __future__ import annotations

import threading

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Apply the SplitMix64 finalizer, a bijection of uint64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(n: int | np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Hash every integer below n, or every element of the array n, to a uint64.

    Hashes for different pairs (seed, epoch) are independent.
    """
    i = np.arange(n, dtype=np.uint64) if isinstance(n, int) else n.astype(np.uint64)
    with np.errstate(over="ignore"):
        key = mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
        key = mix(key + np.array([epoch % 2**64], np.uint64) * _GOLDEN)
        return mix((i + np.uint64(1)) * _GOLDEN ^ key)


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a pseudo-random permutation of the integers below n, int64 [n]."""
    return np.argsort(hashed(n, seed, epoch), kind="stable").astype(np.int64)


class Epochs:
    """Map each row number to the index of an example. Row numbers are unbounded, and indices are below `count`.

    An epoch is `count` consecutive rows. It contains each example index below `count` once, shuffled or in order.
    """

    def __init__(self, count: int, seed: int, shuffle: bool):
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._lock = threading.Lock()
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, rows_B: np.ndarray) -> np.ndarray:
        """Return the example index for each of the row numbers `rows_B` (any >= 0), int64 [B]."""
        if not self._shuffle:
            return rows_B % self._count
        epoch_B = rows_B // self._count
        found_B = np.empty_like(rows_B)
        for epoch in np.unique(epoch_B):
            here_B = epoch_B == epoch
            found_B[here_B] = self._order(int(epoch))[rows_B[here_B] % self._count]
        return found_B

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:  # several threads read rows
            if epoch not in self._orders:
                while len(self._orders) > 1:  # two, because a batch may contain rows of two epochs
                    del self._orders[next(iter(self._orders))]
                self._orders[epoch] = permutation(self._count, self._seed, epoch)
            return self._orders[epoch]


class Balanced:
    """Map each row number to the index of an example, so that every class is equally frequent.

    With C classes, rows k * C to k * C + C - 1 contain one example of each class. Examples of a rare class are
    therefore repeated more often.

    Example:
      >>> index_B = Balanced(np.array([0, 0, 0, 1]), seed=0)(np.arange(6))
      >>> sorted(index_B[0::2].tolist()), index_B[1::2].tolist()
      ([0, 1, 2], [3, 3, 3])
    """

    def __init__(self, labels_N: np.ndarray, seed: int):
        members = (np.flatnonzero(labels_N == c) for c in np.unique(labels_N))
        self._members = [(index_n, Epochs(len(index_n), seed + c, True)) for c, index_n in enumerate(members)]

    def __call__(self, rows_B: np.ndarray) -> np.ndarray:
        """Return the example index for each of the row numbers `rows_B` (any >= 0), int64 [B]."""
        class_B, number_B = rows_B % len(self._members), rows_B // len(self._members)
        found_B = np.empty_like(rows_B)
        for c, (index_n, epochs) in enumerate(self._members):
            here_B = class_B == c
            found_B[here_B] = index_n[epochs(number_B[here_B])]
        return found_B
