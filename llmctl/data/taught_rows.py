"""Add a teacher's stored outputs to training rows.

If each row contains one example, the outputs are stored under the number of the example. The stored outputs then serve
all epochs, seeds and batch sizes. All other rows, such as packed texts, differ in each epoch. The outputs of such rows
are stored under the row number in the training order. A longer training therefore stores further rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmctl.data.pretraining.packing import Batch
from llmctl.data.teacher_records import Layout, Records
from llmctl.data.wrapped_rows import WrappedRows


def is_ordered(rows: Any) -> bool:
    """Return whether the content of a row depends on the training order. This is true for packed texts."""
    return not hasattr(rows, "examples")


def numbers(rows: Any, rows_B: np.ndarray) -> np.ndarray:
    """Return the keys under which a teacher's outputs for the rows `rows_B` are stored, int64 [B].

    The keys are row numbers if the content of rows depends on the training order, else numbers of examples.
    """
    return rows_B if is_ordered(rows) else rows.examples(rows_B)


def needed(rows: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct keys (see `numbers`) of the first `count` rows, ascending, and one row number per key."""
    rows_N = np.arange(count)
    if is_ordered(rows):
        return rows_N, rows_N
    # Later epochs repeat the examples of the first one.
    return np.unique(numbers(rows, rows_N[: len(rows)]), return_index=True)


class TaughtRows(WrappedRows):
    """Add a teacher's stored outputs to rows. A row can be read only if the outputs for this row are stored."""

    def __init__(self, rows: Any, records: Records) -> None:
        super().__init__(rows)
        self._records = records

    @property
    def bare(self) -> Any:
        """Return the rows without the teacher's outputs. These rows can be read even if no outputs are stored."""
        return self._rows

    def added(self, rows_B: np.ndarray, batch: Batch) -> Batch:
        """Return the teacher's stored outputs for the rows `rows_B`, as arrays [B, ...] by name."""
        return self._records.read(numbers(self._rows, rows_B), batch)


class UntaughtRows(WrappedRows):
    """Add arrays of zeros to rows, in place of a teacher's outputs. A plan needs only the shapes of the outputs."""

    def __init__(self, rows: Any, layout: Layout) -> None:
        super().__init__(rows)
        self._layout = layout

    def added(self, rows_B: np.ndarray, batch: Batch) -> Batch:
        """Return arrays of zeros with the shapes of the teacher's outputs."""
        kinds = {n: np.int32 if np.issubdtype(self._layout.stored(n), np.integer) else np.float32 for n in
                 self._layout.shapes}  # fmt: skip
        return {n: np.zeros((len(rows_B), *s), kinds[n]) for n, s in self._layout.shapes.items()}


class SelectedRows:
    """Select the rows with the numbers `which_N`, in this order."""

    def __init__(self, rows: Any, which_N: np.ndarray) -> None:
        self._rows, self._which_N = rows, which_N

    def __len__(self) -> int:
        return len(self._which_N)

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `which_N[rows_B]`, as arrays [B, ...] by name."""
        return self._rows.batch(self._which_N[rows_B])
