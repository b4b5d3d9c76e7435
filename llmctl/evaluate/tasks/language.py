"""Define the base class of language-modelling tasks, and the task "lm", which selects one of these tasks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data.examples.completions import SequencePairRows
from llmctl.data.pretraining import baselines, objective_rows
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.perplexity import target_nll
from llmctl.evaluate.setup import Held, Measured, Setup, programs
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.evaluate.tasks.token_losses import TokenLosses
from llmctl.model import chunked_loss
from llmctl.model.config import ModelConfig


class Language(TokenLosses, Task):
    """Train and evaluate language models. Subclasses define the rows."""

    head = "lm"
    architectures = ("decoder", "encoder", "encoder_decoder")
    columns = ("text",)
    columns_read = columns
    reads = ()
    answers = False
    completes_prompts = True
    text_field = "answer"

    def reading_rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return rows for calibration: the same as in training, without shuffling."""
        return self.rows(model, examples, tokenizer, settings)

    def compares(self, model: ModelConfig, columns: Iterable[str]) -> bool:
        """Return False: two artifacts cannot be compared, because there are no values per example."""
        return False

    def validation_note(self, model: ModelConfig, rows: Any) -> str:
        """Return a note for the user if validation scores the end of each text, unlike `eval`; otherwise ""."""
        if model.architecture != "decoder" and not isinstance(rows, SequencePairRows):
            return ""
        return "validation also scores the end of each text, which eval leaves out; compare it with validations"

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes scores. Its arguments are the parameters and a batch.

        For a decoder, the scores are the negative log-likelihoods [B, T] of the targets in nats. For other
        architectures, the scores are the summed metrics of the loss.
        """
        if model.architecture == "decoder":
            return target_nll(model, dtype)
        loss = self.loss_of(model, dtype=dtype)
        return jax.jit(lambda params, batch: loss(params, batch)[1])

    def peft_task_type(self, model: ModelConfig) -> str:
        """Return PEFT's `task_type` for a language model."""
        return "CAUSAL_LM" if model.architecture == "decoder" else super().peft_task_type(model)


def scored(
    task: Language, artifact: Artifact, rows: Any, setup: Setup, sentinels: tuple[int, ...] = ()
) -> tuple[Any, dict[str, Any]]:
    """Score all rows with a compiled function. Return the function and the metrics.

    The metrics include metrics of a baseline that ignores the context.

    Args:
        task: Task whose `scorer` is used.
        artifact: The scored artifact.
        rows: Rows of the task.
        setup: Settings of the measurement.
        sentinels: Ids of the sentinel tokens of span corruption.
    """
    step = task.scorer(artifact.model, setup.dtype)
    total: dict[str, float] = {}
    with setup.batches().once(rows) as steps:
        for _, batch in steps:
            found = {k: float(v) for k, v in step(artifact.params, batch).items()}
            total = {k: total.get(k, 0.0) + v for k, v in found.items()}
    metrics: dict[str, Any] = {k: float(v) for k, v in chunked_loss.means(total).items()}
    # The fraction of correct tokens is not a classifier's accuracy, which has its own column.
    metrics |= {"token_accuracy": metrics.pop("accuracy"), "nll": metrics.pop("loss")}
    return step, metrics | baselines.constant_scores(rows, len(rows), sentinels) | {
        "predicted_tokens": int(total["weight"])
    }


def timed(
    task: Language, protocol: str, metrics: dict[str, Any], artifact: Artifact, rows: Any, step: Any, setup: Setup
) -> Measured:
    """Return the result of an evaluation (`Measured`): the metrics, and two functions whose speed can be measured.

    One function runs `step` on a single row, the other on a full batch.
    """
    size = setup.batch_size
    inputs = rows.batch(np.arange(size) % len(rows)) | {"row_weight": np.ones(size, np.float32)}
    single, batched = programs(step, artifact.params, inputs, setup.mesh)
    tokens = size * sum(a.shape[1] for name, a in inputs.items() if name.endswith("tokens"))
    units = {"tokens_per_second": tokens}
    return Measured(task.title, protocol, metrics, single, batched, units)


class LanguageModel(Language):
    """Select a language-modelling task by the data and the architecture.

    If the data has prompts and completions, the task is "completions". Otherwise, the task is the pretraining objective
    of the architecture.
    """

    name = "lm"
    title = "language model"

    def select_task(self, model: ModelConfig, columns: Iterable[str]) -> Task:
        """Return the task that "lm" stands for, given a model and the column names of the data."""
        if model.architecture != "encoder" and "completion" in columns:
            return TASKS["completions"]
        return TASKS[objective_rows.default(model.architecture, model.next_sentence)]

    def rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return tokenized rows: of completions if the examples have the column "completion", otherwise of texts."""
        return self.select_task(model, examples.columns).rows(model, examples, tokenizer, settings)

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
        """Return the rows of a training stage, from the task that `select_task` selects for the columns of the data."""
        task = self.select_task(model, text.columns)
        return task.stage_rows(model, text, split, tokenizer, cache, settings, needed)

    def compares(self, model: ModelConfig, columns: Iterable[str]) -> bool:
        """Return whether the selected task returns values per example, so that two artifacts can be compared."""
        columns = list(columns)
        return self.select_task(model, columns).compares(model, columns)

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure an artifact with the task that `select_task` selects for the columns of the data."""
        return self.select_task(artifact.model, held.examples.columns).evaluate(artifact, held, setup)


TASK = LanguageModel()
