"""Define how a task is measured on held-out examples.

Shapes: B rows per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.base import with_article
from llmctl.config.errors import RequestError
from llmctl.data.corpus import Corpus
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate import nonfinite, packed_examples
from llmctl.evaluate.setup import KEPT, Batch, Held, Measured, Setup, answers, first, programs
from llmctl.evaluate.tasks.losses import Losses
from llmctl.evaluate.tasks.rows import RowMethods, RowSettings
from llmctl.model.config import ModelConfig

Found = Iterable[tuple[Batch, Any]]
"""Pairs (host batch, the model's outputs for the batch). Each row occurs exactly once; padding rows are removed."""


@dataclass(frozen=True)
class Scores:
    """Store what a task computes from the outputs of a model.

    Example:
        >>> Scores({"accuracy": 0.5}, values={"accuracy": np.array([0, 1])}).metrics
        {'accuracy': 0.5}
    """

    metrics: dict[str, Any]
    """Metrics by name."""
    answers: tuple[Any, Any] | None = None
    """Pair (true labels, predictions) of all examples; None if the task returns no predictions."""
    records: list[dict[str, Any]] | None = None
    """Records for predictions.jsonl; None if the task writes no records."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Values per example, for intervals and comparisons (see `llmctl.evaluate.metrics.resampling.Values`)."""


class EvaluationMethods(Losses, RowMethods):
    """Define the methods of a task that `eval` calls."""

    def check_model(self, model: ModelConfig, where: str) -> None:
        """Check that the task supports a model.

        Raises:
            RequestError: If the model has another head, or an architecture that the task does not support.
        """
        if model.head != (needed := self.head_for(model)):
            raise RequestError(f"{where}: task {self.name!r} needs the head {needed!r}, this model has {model.head!r}")
        if model.architecture not in self.architectures:
            raise RequestError(
                f"{where}: eval has no task for {with_article(model.architecture)} with the head {model.head!r}"
            )

    def check_examples(self, artifact: Artifact, examples: Examples) -> None:
        """Check that held-out examples match the artifact.

        Raises:
            RequestError: If the data lacks a column, or has labels that the model does not have.
        """

    def compares(self, model: ModelConfig, columns: Iterable[str]) -> bool:
        """Return whether `evaluate` returns values per example, so that two artifacts can be compared.

        Args:
            model: Config of the model.
            columns: Names of the columns of the data.
        """
        return True

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return the compiled function that `eval` runs and times.

        Its arguments are the parameters and a batch. It returns the outputs from which metrics are computed.
        """
        raise NotImplementedError

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure an artifact on held-out examples. Each row is used exactly once.

        Raises:
            RequestError: If `check_examples` rejects the data.
        """
        self.check_examples(artifact, held.examples)
        step = self.measuring_step(artifact.model, setup.dtype)
        rows, scores = self.scored(artifact, held.examples, setup, step, held.corpus, held.folder)
        timed = self.scorer(artifact.model, setup.dtype)
        inputs = first(rows, setup, self.reads)
        single, batched = programs(timed, artifact.params, inputs, setup.mesh)
        units = {"examples_per_second": min(setup.batch_size, len(rows))}
        protocol = self.protocol(artifact, held, setup, rows, scores.metrics)
        return Measured(
            self.title,
            protocol,
            scores.metrics,
            single,
            batched,
            units,
            scores.answers,
            scores.records,
            scores.values,
        )

    def scored(
        self,
        artifact: Artifact,
        examples: Examples,
        setup: Setup,
        step: Any,
        corpus: Callable[[Tokenizer], Corpus] | None = None,
        folder: Path | None = None,
    ) -> tuple[Any, Scores]:
        """Return the rows of examples, and the `Scores` of the model's outputs for these rows.

        Args:
            artifact: The evaluated artifact.
            examples: Held-out examples.
            setup: Settings of the measurement.
            step: Result of `measuring_step`, which several measurements can share.
            corpus: Function that returns the tokens of the examples' texts; None tokenizes the texts.
            folder: Folder for outputs from which an interrupted measurement continues; None saves none.
        """
        settings = RowSettings(setup.seq_len, truncate=setup.truncate, corpus=corpus)
        rows = self.rows(artifact.model, examples, tokenizers.load(artifact.tokenizer_dir), settings)
        found = self.outputs(artifact, rows, setup, step, folder)
        return rows, self.metrics(artifact, examples, rows, found)

    def measuring_step(self, model: ModelConfig, dtype: str) -> Any:
        """Return the compiled function that `outputs` runs.

        If the task packs several texts into a row (see `packs`) and the model supports it, rows are packed. Otherwise
        the function is the result of `scorer`.
        """
        if self.packs and packed_examples.supports(model):
            return packed_examples.step(model, dtype)
        return self.scorer(model, dtype)

    def outputs(self, artifact: Artifact, rows: Any, setup: Setup, step: Any, folder: Path | None = None) -> Found:
        """Yield the outputs for all rows, in the order of the rows. Each row is used exactly once.

        Args:
            artifact: The evaluated artifact.
            rows: Rows of the examples.
            setup: Settings of the measurement.
            step: Result of `measuring_step`.
            folder: Folder for outputs from which an interrupted measurement continues; None saves none.

        Raises:
            WorkError: If an output is not a finite number.
        """
        model, params = artifact.model, artifact.params
        if self.packs and packed_examples.supports(model):
            yield from packed_examples.outputs(step, artifact, rows, setup, folder)
            return
        for batch, found in answers(step, params, rows, setup, self.reads, what=artifact.path.name):
            for y in jax.tree.leaves(found):
                nonfinite.check(model, params, batch, y, np.array(True), setup.mesh, setup.dtype, self.model_inputs)
            yield batch, found

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scores:
        """Compute metrics from the model's outputs.

        Args:
            artifact: The evaluated artifact.
            examples: Held-out examples.
            rows: Rows of the examples.
            found: Host batches with the model's outputs.
        """
        raise NotImplementedError

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: Any, metrics: dict[str, Any]) -> str:
        """Return a description of the measurement: split, number of examples, truncation and dtype.

        Metrics are comparable only if their descriptions are equal.
        """
        cut = f"{KEPT[setup.truncate]} {setup.seq_len} tokens"
        return f"{held.split} split, {len(held.examples)} examples, {cut}, {setup.dtype}"
