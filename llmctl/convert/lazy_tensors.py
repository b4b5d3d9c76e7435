"""Tensors that are not in memory yet: what a file holds, by name, and what is about to be written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llmctl.config.errors import RequestError

SHOWN = 6
"""Names that an error lists before it counts the rest."""


@dataclass(frozen=True)
class Tensor:
    """One tensor, read when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


def of_array(array: np.ndarray) -> Tensor:
    """An array as a tensor."""
    return Tensor(tuple(array.shape), array.dtype, lambda: array)


def listed(names: Iterable[str]) -> str:
    """Some names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def dtype(name: str) -> np.dtype:
    """A floating type by name. Raises RequestError for another name."""
    if name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]
