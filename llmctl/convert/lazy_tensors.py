"""Define lazy tensors: the shape and dtype of a tensor, and a function that reads its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llmctl.config.errors import RequestError

SHOWN = 6
"""Maximum number of names in an error message."""


@dataclass(frozen=True)
class Tensor:
    """Describe a tensor whose values are read on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    rounded: bool = False
    """Whether the values are dequantized integers. If so, some values may be 0 only because of rounding."""

    @property
    def nbytes(self) -> int:
        """Return the size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


def of_array(array: np.ndarray) -> Tensor:
    """Return a Tensor with the values of an array in memory."""
    return Tensor(tuple(array.shape), array.dtype, lambda: array)


def listed(names: Iterable[str]) -> str:
    """Join the first `SHOWN` names with commas, for an error message. If there are more, append " and N more"."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def common(kinds: Iterable[np.dtype]) -> np.dtype:
    """Return the narrowest dtype that can represent every value of the given floating-point dtypes.

    Candidates are the given dtypes, float16, bfloat16 and float32. NumPy cannot promote float8 or bfloat16 together
    with other 16-bit or 8-bit types.

    Example:
        >>> common([np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)])
        dtype('float32')
        >>> common([np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)])
        dtype(bfloat16)
    """
    kinds = list(dict.fromkeys(kinds))
    wider = sorted({*kinds, *DTYPES.values()}, key=lambda k: (k.itemsize, k not in kinds, str(k)))
    return next((k for k in wider if all(_holds(k, other) for other in kinds)), np.dtype(np.float64))


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    a, b = ml_dtypes.finfo(wide), ml_dtypes.finfo(narrow)
    return wide == narrow or (a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp - a.nmant <= b.minexp - b.nmant)


def dtype(name: str) -> np.dtype:
    """Return the floating-point dtype called `name`.

    Raises:
        RequestError: If llmctl does not support this dtype.
    """
    if name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]
