"""Add arrays to training rows when they are read."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmctl.data.pretraining.packing import Batch


class WrappedRows:
    """Read rows, and add the arrays that `added` returns. All other attributes are read from the rows.

    >>> class Numbered(WrappedRows):
    ...     def added(self, rows_B, batch):
    ...         return {"number": rows_B}
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not yet set, as in a copy
            raise AttributeError(name)
        return getattr(self._rows, name)

    def __getitem__(self, i: int) -> Batch:
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `rows_B`: their own arrays [B, ...] and the added arrays."""
        batch = self._rows.batch(rows_B)
        return batch | self.added(rows_B, batch)

    def added(self, rows_B: np.ndarray, batch: Batch) -> Batch:
        """Return the arrays that are added to the rows `rows_B`.

        Args:
          rows_B: Row numbers.
          batch: The rows without the added arrays.
        """
        raise NotImplementedError
