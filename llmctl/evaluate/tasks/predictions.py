"""Predict new rows: build model inputs without labels, and format the outputs.

A *prediction* is the model's output for one row: class probabilities, a number or a vector. An *answer* is a prediction
as JSON data. If the task allows averaging, the predictions of several artifacts are averaged.

Shapes: B rows, T tokens per row, N new rows, C classes, W words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from llmctl.data.examples.labelled import ClassificationRows
from llmctl.data.source import Row, Table
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig

if TYPE_CHECKING:
    from llmctl.artifacts.manifest import Manifest

Batch = dict[str, Any]
Outputs = Iterable[tuple[np.ndarray, Batch, Any]]
"""Tuples (row indices [B], host batch of these rows, outputs of the compiled function [B, ...] on the host)."""
DIGITS = 6
"""Number of significant digits of probabilities and numbers in predictions."""


class Predicts:
    """Define the methods of a task that predict new rows. The default methods suit tasks with one output per row."""

    asks: ClassVar[tuple[str, ...]] = ("text",)
    """Columns that a new row must have, by llmctl's own column names."""
    text_field: ClassVar[str] = "label"
    """Name of the answer's field that `predict --to text` writes."""
    averages: ClassVar[bool] = True
    """Whether outputs of several artifacts may be averaged."""

    def new_rows(self, model: ModelConfig, rows: Sequence[Row], tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return tokenized model inputs for new rows of the user.

        Args:
            model: Config of the model.
            rows: New rows. All rows have a second text ("pair"), or no row has a second text.
            tokenizer: Tokenizer of the model.
            settings: Sequence length, truncation and class names.
        """
        columns = ("text", "pair") if "pair" in rows[0] else ("text",)
        examples, truncate = new_examples(rows, columns), settings.truncate
        return ClassificationRows(examples, tokenizer, settings.seq_len, truncate=truncate, shuffle=False)

    def prediction_step(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes predictions for rows, arrays [B, ...].

        Its arguments are the parameters and a batch.
        """

        @jax.jit
        def run(params: functional.Params, batch: Batch) -> Any:
            x_BTD = functional.hidden(model, params, batch, dtype=dtype)
            return self.prediction(functional.outputs(model, params, x_BTD, batch, dtype), batch)

        return run

    def prediction(self, y: jax.Array, batch: Batch) -> Any:
        """Convert outputs of the task head [B, ...] to predictions. By default, return the outputs."""
        return y

    def predictions(self, count: int, rows: Any, outputs: Outputs) -> list[Any]:
        """Return the prediction for each of `count` new rows, in the order of the rows."""
        found: list[Any] = [None] * count
        for index_B, _, outputs_B in outputs:
            for i, one in zip(index_B, outputs_B, strict=True):
                found[i] = one
        return found

    def answer(self, row: Row, prediction: Any, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Format the prediction for one row as JSON data.

        Args:
            row: The new row.
            prediction: The prediction for the row, such as class probabilities.
            manifest: The artifact's manifest, which has the class names.
            every: Whether to include the probability of every class.
        """
        raise NotImplementedError


def new_examples(rows: Sequence[Row], columns: tuple[str, ...], classes: tuple[str, ...] = ()) -> Examples:
    """Return new rows as examples. All labels are 0, and a missing column is an empty text."""
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
    """Round a number to `DIGITS` significant digits."""
    return float(f"{float(x):.{DIGITS}g}")


def named(names: Sequence[str], p_C: np.ndarray) -> dict[str, float]:
    """Return {class name: rounded probability}."""
    return {name: short(p) for name, p in zip(names, p_C, strict=True)}
