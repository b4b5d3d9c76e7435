"""Predict the labels, numbers, tags, answers or embeddings of new rows with saved models.

A batch has rows of similar length, which are padded to one of a few lengths. Each length has one compiled program.

Shapes: B rows per batch, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llmctl.artifacts import artifact
from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.config.limits import check_memory
from llmctl.config.settings import MeshConfig
from llmctl.data import device_batches
from llmctl.data.config import Truncate
from llmctl.data.source import Row
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.distributed import host_arrays
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.predict_text import TextPredictor
from llmctl.evaluate.setup import ROW, prediction_length
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.registry import of
from llmctl.evaluate.tasks.rows import RowSettings

SHORTEST = 16
"""Smallest padded length in tokens. The other padded lengths are larger powers of two, and the maximum sequence
length."""


class Predictor:
    """Predict rows with one artifact. Store the artifact's parameters, its task and the compiled function."""

    def __init__(
        self,
        source: Path | Artifact,
        batch_size: int = 32,
        seq_len: int = 0,
        dtype: str = "float32",
        truncate: Truncate | None = None,
        mesh: Mesh | None = None,
    ):
        """Load the artifact onto all devices.

        Args:
            source: Folder of the artifact, or the artifact if it is already on all devices.
            batch_size: Number of rows per batch. The number is rounded up to a multiple of the number of devices.
            seq_len: Maximum number of tokens per row; 0 uses the value of training (see `prediction_length`).
            dtype: Dtype of the computation.
            truncate: Part of a long text to remove; None uses the value of training.
            mesh: Mesh on whose devices the artifact is; None makes the mesh of all devices.

        Raises:
            RequestError: If the folder is no artifact. If the model has no task head. If `seq_len` exceeds the model's
                maximum sequence length.
        """
        self.mesh = mesh or meshes.make(MeshConfig())
        found = source if isinstance(source, Artifact) else artifact.load(source, self.mesh)
        path = found.path
        self.manifest, self._params, self.task = found.manifest, found.params, of(found.manifest)
        if generates(found):
            raise RequestError(f"{path}: is a language model, which `llmctl generate` runs; predict needs a task head")
        self._model, self._seq_len = found.model, prediction_length(self.manifest, seq_len, path)
        self._size = -(-batch_size // self.mesh.size) * self.mesh.size
        check_memory(self._size * self._seq_len * ROW, f"--batch-size {batch_size}: its rows", "take a smaller one")
        self._truncate: Truncate = truncate or self.manifest.truncate or "tail"
        self._tokenizer = tokenizers.load(found.tokenizer_dir)
        self._step = self.task.prediction_step(found.model, dtype)

    def predictions(self, rows: Sequence[Row]) -> list[Any]:
        """Return the unformatted prediction for each row, such as class probabilities or a number.

        The predictions are in the order of `rows`. Rows with a second text and rows without a second text run in
        separate batches. The prediction of a row therefore does not depend on the other rows.
        """
        labels, found = tuple(self.manifest.labels), [None] * len(rows)
        settings = RowSettings(self._seq_len, truncate=self._truncate, labels=labels)
        for paired in (False, True):
            index = [i for i, row in enumerate(rows) if ("pair" in row) == paired]
            if not index:
                continue
            chosen = [rows[i] for i in index]
            made = self.task.new_rows(self._model, chosen, self._tokenizer, settings)
            with meshes.use(self.mesh):
                for i, prediction in zip(
                    index, self.task.predictions(len(chosen), made, self._outputs(made)), strict=True
                ):
                    found[i] = prediction
        return found

    def _outputs(self, rows: Any) -> Iterator[tuple[np.ndarray, dict[str, Any], Any]]:
        """Yield (row indices [B], host batch, outputs on the host) for batches of rows, the shortest rows first."""
        whole = rows.batch(np.arange(len(rows)))
        length_N = np.max([(a > 0).sum(-1) for name, a in whole.items() if name.endswith("segments")], axis=0)
        order_N = np.argsort(length_N, kind="stable")
        running = []
        for first in range(0, len(order_N), self._size):
            index_B = order_N[first : first + self._size]
            width = padded_length(int(length_N[index_B[-1]]), self._seq_len)
            batch = {k: self._cut(a[index_B], width) for k, a in whole.items()}
            # The last batch repeats a row, so that it runs in the same program.
            filled = {k: a[np.minimum(np.arange(self._size), len(index_B) - 1)] for k, a in batch.items()}
            placed = device_batches.place(
                {k: a for k, a in filled.items() if k in (self.task.reads or filled)}, self.mesh, reading_order=True
            )
            running.append((index_B, batch, self._step(self._params, placed)))
        for index_B, batch, found in running:
            yield index_B, batch, jax.tree.map(lambda a, n=len(index_B): host_arrays.read(a)[:n], found)

    def _cut(self, a: np.ndarray, width: int) -> np.ndarray:
        return a[:, :width] if a.ndim > 1 and a.shape[1] == self._seq_len else a


class Ensemble:
    """Average the predictions of several artifacts that have the same task."""

    window = 32
    """Number of batches that are predicted together. Their rows are sorted by length, to reduce padding."""
    remarks: tuple[str, ...] = ()
    """Log lines about truncated prompts, as in `TextPredictor`. Always empty, because an ensemble reads no prompts."""

    def __init__(self, members: Sequence[Predictor]):
        """Check that the predictions of the members can be averaged.

        Raises:
            RequestError: If the members have different tasks or classes, or if the task does not support averaging.
        """
        self.members, self.manifest, self.task = members, members[0].manifest, members[0].task
        for other in members[1:]:
            if not self.task.averages:
                raise RequestError(
                    f"predict: answers of the task {self.task.name!r} have no average; name one artifact"
                )
            if other.task is not self.task or sorted(other.manifest.labels) != sorted(self.manifest.labels):
                raise RequestError(
                    f"predict: {other.manifest.name} has another task or other classes than {self.manifest.name}"
                )
        names = self.manifest.labels
        self._order = [[m.manifest.labels.index(name) for name in names] for m in members]

    def read(self, row: Row, where: str) -> Row:
        """Return the row if it has the columns of the task.

        Raises:
            RequestError: If a column is missing, or has only white space.
        """
        return check_columns(self.task, row, where)

    def answers(self, rows: Sequence[Row], every: bool = False) -> list[dict[str, Any]]:
        """Return the answer to each row: its prediction as JSON data.

        If `every` is true, include the probability of every class.
        """
        if not rows:
            return []
        found = [m.predictions(rows) for m in self.members]
        if len(found) > 1:
            found = [
                [b[..., order] if order else b for b in own] for own, order in zip(found, self._order, strict=True)
            ]
        predictions = found[0] if len(found) == 1 else [np.mean(one, axis=0) for one in zip(*found, strict=True)]
        return [self.task.answer(row, b, self.manifest, every) for row, b in zip(rows, predictions, strict=True)]


def predictor(
    loaded: Sequence[Artifact], batch_size: int, seq_len: int, dtype: str, max_new: int = 0, beams: int = 0
) -> Ensemble | TextPredictor:
    """Return an `Ensemble` of the artifacts, or a `TextPredictor` if a single language model generates answers.

    Args:
        loaded: Artifacts on all devices.
        batch_size: Number of rows per batch.
        seq_len: Maximum number of tokens per row; 0 uses the value of training.
        dtype: Dtype of the computation.
        max_new: Maximum number of tokens per generated answer; 0 uses the setting of finetuning.
        beams: Number of beams; 0 uses the setting of finetuning.

    Raises:
        RequestError: If an artifact cannot predict. If the predictions of several artifacts cannot be averaged. If
            settings for generating answers are given for a task head.
    """
    generators = [found for found in loaded if generates(found)]
    if generators and len(loaded) > 1:
        raise RequestError(f"{generators[0].path}: generated answers have no average; name one artifact")
    if generators:
        return TextPredictor(generators[0], batch_size, seq_len, dtype, max_new, beams)
    if max_new or beams:
        raise RequestError(f"{loaded[0].path}: generates no text; leave --max-new and --beams out")
    return Ensemble([Predictor(found, batch_size, seq_len, dtype) for found in loaded])


def check_columns(task: Task, row: Row, where: str) -> Row:
    """Return the row if it has the columns of the task.

    Raises:
        RequestError: If a column is missing, or has only white space.
    """
    asked = task.asks or (("tokens",) if "tokens" in row else ("text",))
    for name in asked:
        if name not in row:
            said = name if task.asks else "tokens (a list of words) or text"
            raise RequestError(f"{where}: no {said}; --column {name}=NAME names the column")
        if not "".join(row[name]).strip():
            raise RequestError(f"{where}: the column {name!r} is empty")
    return row


def generates(found: Artifact) -> bool:
    """Return True if `predict` generates answers: the task completes prompts, and the head predicts tokens."""
    return found.model.head_kind.vocabulary and of(found.manifest).completes_prompts


def padded_length(length: int, longest: int) -> int:
    """Return the padded length of a row: the smallest power of two >= `length` and SHORTEST, but at most `longest`.

    Example:
        >>> [padded_length(n, 100) for n in (3, 16, 17, 65, 100)]
        [16, 16, 32, 100, 100]
    """
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), longest)
