"""Predict new rows: what a task reads of a row without a label, and how it states the model's answer.

The network's outputs for a row are its belief: probabilities of classes, a number, a vector. Beliefs of several
artifacts are averaged before the answer is stated, if the task allows it.

Shapes: B rows, T tokens per row, N new rows, C classes, W words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from llmctl.data.config import Truncate
from llmctl.data.examples.labelled import ClassificationRows
from llmctl.data.source import Row, Table
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.model import functional
from llmctl.model.config import ModelConfig

if TYPE_CHECKING:
    from llmctl.artifacts.manifest import Manifest

Batch = dict[str, Any]
Outputs = Iterable[tuple[np.ndarray, Batch, Any]]
"""(indices of rows [B], their host batch, outputs of the compiled step [B, ...] on the host)."""
DIGITS = 6
"""Significant digits of a probability or number in an answer."""


class Predicts:
    """Predictions of a task. The defaults are those of tasks with one output per text, or per pair of texts."""

    asks: ClassVar[tuple[str, ...]] = ("text",)
    """Canonical columns that a new row must have."""
    averages: ClassVar[bool] = True
    """Whether beliefs of several artifacts may be averaged."""

    def new_rows(
        self, rows: Sequence[Row], tokenizer: Tokenizer, seq_len: int, labels: Sequence[str], truncate: Truncate
    ) -> Any:
        """Return rows of the model for new rows of the user, which have a pair either all or not at all.

        `labels` are the class names of the artifact.
        """
        columns = ("text", "pair") if "pair" in rows[0] else ("text",)
        return ClassificationRows(new_examples(rows, columns), tokenizer, seq_len, truncate=truncate, shuffle=False)

    def believer(self, model: ModelConfig, dtype: str) -> Any:
        """Return the compiled (params, batch) -> beliefs [B, ...]."""

        @jax.jit
        def run(params: functional.Params, batch: Batch) -> Any:
            x_BTD = functional.hidden(model, params, batch, dtype=dtype)
            return self.belief(functional.outputs(model, params, x_BTD, batch, dtype), batch)

        return run

    def belief(self, y: jax.Array, batch: Batch) -> Any:
        """Return the beliefs from the outputs of the head."""
        return y

    def beliefs(self, count: int, rows: Any, outputs: Outputs) -> list[Any]:
        """Return the belief of each of `count` new rows, in their order."""
        found: list[Any] = [None] * count
        for index_B, _, outputs_B in outputs:
            for i, one in zip(index_B, outputs_B, strict=True):
                found[i] = one
        return found

    def answer(self, row: Row, belief: Any, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Return the answer as JSON data.

        Args:
          row: the new row.
          belief: its belief.
          manifest: the artifact's manifest, for the names of the classes.
          every: also return the probability of every class.
        """
        raise NotImplementedError


def new_examples(rows: Sequence[Row], columns: tuple[str, ...], classes: tuple[str, ...] = ()) -> Examples:
    """Return examples of rows in memory, with zeros as labels. A column that a row lacks is an empty text."""
    N = len(rows)
    table = Table("rows", columns, [tuple(row.get(c, "") for c in columns) for row in rows], list(range(1, N + 1)))
    none = np.zeros(N)
    return Examples(
        source=table,
        columns=columns,
        index=np.arange(N),
        fraction=none,
        digests=none,
        chars=none,
        labels=np.zeros(N, np.int32),
        part=np.zeros(N, np.int32),
        classes=classes,
    )


def short(x: Any) -> float:
    """Return a number with few digits."""
    return float(f"{float(x):.{DIGITS}g}")


def named(names: Sequence[str], p_C: np.ndarray) -> dict[str, float]:
    """Return the probability of each class by its name."""
    return {name: short(p) for name, p in zip(names, p_C, strict=True)}
