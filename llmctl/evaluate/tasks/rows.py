"""Build the rows that a task is trained, evaluated and calibrated on, from examples of the data.

Example:
    >>> RowSettings(128, truncate="head_tail", seed=1)
    RowSettings(seq_len=128, shuffle=False, seed=1, truncate='head_tail', target_len=0, labels=(), corpus=None)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig, Truncate
from llmctl.data.corpus import Corpus
from llmctl.data.examples.labelled import ClassificationRows
from llmctl.data.pretraining.lm_corpus import Text, check_epochs
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.tasks.record import TaskRecord
from llmctl.model.config import ModelConfig
from llmctl.model.head_kinds import HEAD_KINDS

KINDS = {"class": "classes", "number": "numbers", "set": "sets of classes"}
"""Map from `data.label_type` to the words for the labels in error messages."""


@dataclass(frozen=True)
class RowSettings:
    """Configure the rows of a task. A task ignores the settings that do not apply to it."""

    seq_len: int
    """Maximum number of tokens per row."""
    shuffle: bool = False
    """Whether to shuffle the rows in each epoch."""
    seed: int = 0
    """Seed of the shuffle."""
    truncate: Truncate = "tail"
    """Part of a long text to remove: the end ("tail") or the middle ("head_tail")."""
    target_len: int = 0
    """Maximum number of tokens per completion, for encoder-decoders only. 0 uses `seq_len`."""
    labels: tuple[str, ...] = ()
    """Class names of the artifact, for new rows."""
    corpus: Callable[[Tokenizer], Corpus] | None = None
    """Function from a tokenizer to the cached tokens of the examples' texts. If None, the texts are tokenized."""

    @property
    def order(self) -> dict[str, Any]:
        """Return the settings that determine the order of rows, `seed` and `shuffle`, as keyword arguments of row
        classes.
        """
        return {"seed": self.seed, "shuffle": self.shuffle}


class RowMethods(TaskRecord):
    """Define the methods of a task that check data and build rows."""

    @property
    def reads_labels(self) -> bool:
        """Return True if the task's rows have labels. Rows of language-modelling tasks have no labels."""
        return not HEAD_KINDS[self.head].vocabulary

    def check_data(self, data: DataConfig, labels: Sequence[str]) -> None:
        """Check that the data of a training stage has the label type and the classes that the task needs.

        Raises:
            RequestError: If the label type is wrong, or if there are fewer than two classes.
        """
        self.check_label_type(data)
        if self.classes and len(labels) < 2:
            raise RequestError(f"classification needs two classes at least, the data has {len(labels)}")

    def check_training(self, examples: Examples) -> None:
        """Check that a task can learn from training examples.

        Raises:
            RequestError: If the labels of all examples are of one class.
        """
        labels = examples.labels
        if not self.classes or labels is None or labels.ndim > 1:
            return
        if len(present := np.unique(labels)) == 1 and len(examples.classes) > 1:
            name = examples.classes[int(present[0])]
            raise RequestError(f"all training texts are of the class {name!r}; classification needs two at least")

    def check_label_type(self, data: DataConfig) -> None:
        """Check that `data.label_type` is the type that the task needs.

        Raises:
            RequestError: If the label type differs.
        """
        if self.label_type and data.label_type != self.label_type:
            kind = KINDS[self.label_type]
            raise RequestError(f'task {self.name}: labels are {kind}; set data.label_type = "{self.label_type}"')

    def rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return tokenized rows with labels, for training and evaluation.

        Args:
            model: Config of the model.
            examples: Examples with the task's columns.
            tokenizer: Tokenizer of the model.
            settings: Settings of the rows.

        Raises:
            RequestError: If the data lacks a column.
        """
        return ClassificationRows(
            examples,
            tokenizer,
            settings.seq_len,
            truncate=settings.truncate,
            corpus=settings.corpus(tokenizer) if settings.corpus else None,
            **settings.order,
        )

    def stage_rows(
        self,
        model: ModelConfig,
        text: Text,
        split: str,
        tokenizer: Tokenizer,
        cache: Path,
        settings: RowSettings,
        needed: int = 0,
    ) -> Any:
        """Return the rows of a split of the data. Check that there are enough rows for a stage that reads `needed`
        rows.

        Args:
            model: Config of the model.
            text: The stage's data.
            split: train, validation or test.
            tokenizer: Tokenizer of the model.
            cache: Folder that caches tokenized raw text.
            settings: Settings of the rows, except `target_len`, which is taken from `text`.
            needed: Number of rows that will be read.

        Raises:
            RequestError: If the data lacks a column, or if `needed` exceeds the number of rows times the allowed epochs
                (`data.epochs`).
        """
        rows = self.rows(model, text.splits[split], tokenizer, replace(settings, target_len=text.target_len))
        if text.epochs:
            check_epochs(needed, round(text.epochs * len(rows)))
        return rows

    def reading_rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return rows without labels for calibration: one text, or one pair of texts, per row."""
        return ClassificationRows(
            unlabelled(examples), tokenizer, settings.seq_len, truncate=settings.truncate, shuffle=False
        )


def unlabelled(examples: Examples) -> Examples:
    """Return the examples. If the examples have no labels, all labels are set to 0."""
    return examples if examples.labels is not None else replace(examples, labels=np.zeros(len(examples), np.int32))
