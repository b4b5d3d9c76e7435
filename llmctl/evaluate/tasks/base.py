"""Define a task: the record with all facts about what a model is finetuned for and measured on.

A new task is a subclass whose instance is registered in `llmctl.evaluate.tasks.registry`. It overrides methods:

    class Ordinal(Classify):
        name, title = "ordinal", "ordinal classification"

        def score(self, y, batch, options):
            ...

    TASK = Ordinal()

Shapes: B rows, T tokens per row, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.base import with_article
from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig, Truncate
from llmctl.data.corpus import Corpus
from llmctl.data.examples.labelled import ClassificationRows
from llmctl.data.pretraining.lm_corpus import Text, check_epochs
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.setup import KEPT, READ, Batch, Held, Measured, Setup, answers, first, programs
from llmctl.evaluate.tasks.predictions import Predicts
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.head_kinds import HEAD_KINDS
from llmctl.model.hf_config import Keys
from llmctl.model.losses import NEARNESS, Loss, Sums

if TYPE_CHECKING:
    from llmctl.data.device_batches import Rows

Corpora = Callable[[Tokenizer], Corpus]
"""Function from a tokenizer to the tokens of the examples' texts, which are cached."""
Found = Iterable[tuple[Batch, Any]]
"""Host batches with the model's outputs; every row once, without padding rows."""
Scored = tuple[dict[str, Any], tuple[Any, Any] | None]
"""Metrics by name, and (truth, predictions) of all examples, or None if there are none."""

KINDS = {"class": "classes", "number": "numbers", "set": "sets of classes"}
"""Names of label types in messages, by `data.label_type`."""


@dataclass(frozen=True)
class Options:
    """Settings of a training or validation loss."""

    dtype: Any = jnp.float32
    """Compute type."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the targets; it changes the loss, not the metrics."""
    z_loss: float = 0.0
    """Weight of log(Z)^2; it changes the loss, not the metrics."""
    temperature: float = NEARNESS
    """Divisor of the similarities of embeddings."""
    labels: Sequence[str] = ()
    """Names of the classes, given for validation metrics that read them."""


class Task(Predicts):
    """One task. The defaults are those of tasks that read one text, or a pair of texts, per row.

    Example:
      >>> from llmctl.evaluate.tasks.registry import TASKS
      >>> TASKS["classify"].head, TASKS["classify"].best(["no", "yes"])
      ('classify', 'accuracy')
    """

    name: ClassVar[str]
    """Name in the registry."""
    head: ClassVar[str]
    """Head that the model needs, a key of `llmctl.model.head_kinds.HEAD_KINDS`."""
    title: ClassVar[str]
    """Name in the results of an evaluation."""
    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder")
    """Architectures that it can be measured on."""
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    """Canonical columns that its rows must have."""
    columns_read: ClassVar[tuple[str, ...]] = ()
    """Canonical columns that `reading_rows` must have; without any, one text column is enough."""
    label_type: ClassVar[str] = ""
    """Value that `data.label_type` must have; empty if it does not matter."""
    classes: ClassVar[bool] = False
    """Whether the model has one output per label of the data, whose names the artifact stores."""
    pooling: ClassVar[str] = ""
    """Default pooling; empty keeps that of the model."""
    answers: ClassVar[bool] = True
    """Whether `metrics` returns the truth and the predictions, which metrics with a function need."""
    reads: ClassVar[tuple[str, ...]] = READ
    """Arrays of a batch that `scorer` reads; empty means all."""
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    """PEFT's `task_type`."""
    problem_type: ClassVar[str] = ""
    """Hugging Face's `problem_type`; empty writes none."""

    # --- data --------------------------------------------------------------------------------------------------------

    @property
    def reads_labels(self) -> bool:
        """Return whether rows may have labels. Language models read text alone, and ignore what labels are."""
        return not HEAD_KINDS[self.head].vocabulary

    def check_data(self, data: DataConfig, labels: Sequence[str]) -> None:
        """Check the data of a stage that trains.

        Raises:
          RequestError: the labels are typed otherwise, or there are too few classes.
        """
        self.check_label_type(data)
        if self.classes and len(labels) < 2:
            raise RequestError(f"classification needs two classes at least, the data has {len(labels)}")

    def check_label_type(self, data: DataConfig) -> None:
        """Check how the labels of a stage's data are typed.

        Raises:
          RequestError: they are typed otherwise than the task's.
        """
        if self.label_type and data.label_type != self.label_type:
            kind = KINDS[self.label_type]
            raise RequestError(f'task {self.name}: labels are {kind}; set data.label_type = "{self.label_type}"')

    def rows(
        self,
        model: ModelConfig,
        examples: Examples,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        shuffle: bool,
        truncate: Truncate = "tail",
        corpus: Corpora | None = None,
    ) -> Any:
        """Return the rows that the task learns from and is measured on.

        Raises:
          RequestError: the data lacks a column.
        """
        return ClassificationRows(
            examples,
            tokenizer,
            seq_len,
            truncate=truncate,
            seed=seed,
            shuffle=shuffle,
            corpus=corpus(tokenizer) if corpus else None,
        )

    def row_settings(self, text: Text) -> dict[str, Any]:
        """Return further arguments of `rows` that the data config of a stage sets."""
        return {}

    def stage_rows(
        self,
        model: ModelConfig,
        text: Text,
        split: str,
        tokenizer: Tokenizer,
        seq_len: int,
        cache: Path,
        *,
        seed: int = 0,
        shuffle: bool,
        truncate: Truncate = "tail",
        needed: int = 0,
    ) -> Any:
        """Return `rows` of a split, for a stage that reads `needed` of them.

        Raises:
          RequestError: as `rows`; or `needed` rows are more than the epochs of the sources hold.
        """
        how = {"seed": seed, "shuffle": shuffle, "truncate": truncate, **self.row_settings(text)}
        rows = self.rows(model, text.splits[split], tokenizer, seq_len, **how)
        if text.epochs:
            check_epochs(needed, round(text.epochs * len(rows)))
        return rows

    def reading_rows(
        self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, seq_len: int, *, truncate: Truncate = "tail"
    ) -> Any:
        """Return rows that need no labels, for calibration: one text, or one pair of texts, per row."""
        return ClassificationRows(unlabelled(examples), tokenizer, seq_len, truncate=truncate, shuffle=False)

    # --- training ----------------------------------------------------------------------------------------------------

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return the validation metric that selects the best parameters."""
        return "loss"

    def woven(self, batch: Batch) -> Batch:
        """Return the batch in the form that the network reads."""
        return batch

    def loss_of(self, cfg: ModelConfig, *, remat: str = "none", **options: Any) -> Loss:
        """Return the loss (params, batch, dropout key or None) -> (sum of losses, sums with "weight").

        Args:
          cfg: the network.
          remat: what the backward pass recomputes.
          **options: fields of `Options`.
        """
        settings = Options(**options)

        def loss(params: functional.Params, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
            batch = self.woven(batch)
            x_BTD = functional.hidden(
                cfg, params, batch, train=key is not None, rng=key, dtype=settings.dtype, remat=remat
            )
            return self.loss(cfg, params, x_BTD, batch, settings)

        return loss

    def loss(
        self, cfg: ModelConfig, params: functional.Params, x_BTD: jax.Array, batch: Batch, options: Options
    ) -> tuple[jax.Array, Sums]:
        """Return the loss and its sums from hidden states."""
        return self.score(functional.outputs(cfg, params, x_BTD, batch, options.dtype), batch, options)

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the loss and its sums from the outputs of the task head."""
        raise NotImplementedError

    def soft_loss_of(
        self,
        cfg: ModelConfig,
        teacher_cfg: ModelConfig,
        *,
        dtype: Any = jnp.float32,
        remat: str = "none",
        temperature: float,
        hard: float,
    ) -> Callable[..., tuple[jax.Array, Sums]]:
        """Return the distillation loss (student's params, batch, dropout key, teacher's params) -> (loss, sums).

        Args:
          cfg: the student.
          teacher_cfg: the teacher.
          dtype: compute type.
          remat: what the backward pass recomputes.
          temperature: softmax temperature of both distributions.
          hard: weight of the loss on labels; the remainder weighs the divergence from the teacher.
        """

        def loss(
            params: functional.Params, batch: Batch, key: jax.Array, teacher: functional.Params
        ) -> tuple[jax.Array, Sums]:
            batch = self.woven(batch)
            taught_BTE = jax.lax.stop_gradient(functional.hidden(teacher_cfg, teacher, batch, dtype=dtype))
            x_BTD = functional.hidden(cfg, params, batch, train=True, rng=key, dtype=dtype, remat=remat)
            student, taught = (cfg, params, x_BTD), (teacher_cfg, teacher, taught_BTE)
            return self.soft_loss(student, taught, batch, dtype, temperature, hard)

        return loss

    def soft_loss(
        self, student: Network, teacher: Network, batch: Batch, dtype: Any, temperature: float, hard: float
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and its sums from hidden states of both networks."""
        cfg, params, x = teacher
        taught = functional.outputs(cfg, params, x, batch, dtype)
        cfg, params, x = student
        return self.soft_score(taught, functional.outputs(cfg, params, x, batch, dtype), batch, temperature, hard)

    def soft_score(
        self, teacher: jax.Array, y: jax.Array, batch: Batch, temperature: float, hard: float
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and its sums from the outputs of both task heads."""
        raise NotImplementedError

    def fit(self, model: ModelConfig, params: functional.Params, rows: Rows, setup: Setup) -> dict[str, Any]:
        """Return values that the task fits on validation rows after training; the artifact stores them as `fitted`."""
        return {}

    # --- evaluation --------------------------------------------------------------------------------------------------

    def check_model(self, model: ModelConfig, where: str) -> None:
        """Check that a model can be measured.

        Raises:
          RequestError: it has another head, or an architecture that the task cannot measure.
        """
        if model.head != self.head:
            raise RequestError(
                f"{where}: task {self.name!r} needs the head {self.head!r}, this model has {model.head!r}"
            )
        if model.architecture not in self.architectures:
            raise RequestError(
                f"{where}: eval has no task for {with_article(model.architecture)} with the head {model.head!r}"
            )

    def check_examples(self, artifact: Artifact, examples: Examples) -> None:
        """Check the data of an evaluation.

        Raises:
          RequestError: it lacks a column, or its labels are not the model's.
        """

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return the compiled step (params, batch) -> outputs that `eval` runs and times."""
        raise NotImplementedError

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure an artifact on held-out examples, every row once.

        Raises:
          RequestError: as `check_examples`.
        """
        self.check_examples(artifact, held.examples)
        tokenizer = tokenizers.load(artifact.tokenizer_dir)
        rows = self.rows(
            artifact.model,
            held.examples,
            tokenizer,
            setup.seq_len,
            shuffle=False,
            truncate=setup.truncate,
            corpus=held.corpus,
        )
        step = self.scorer(artifact.model, setup.dtype)
        found = answers(step, artifact.params, rows, setup, self.reads)
        metrics, predictions = self.metrics(artifact, held.examples, rows, found)
        single, batched = programs(step, artifact.params, first(rows, setup, self.reads), setup.mesh)
        units = {"examples_per_second": setup.batch_size}
        protocol = self.protocol(artifact, held, setup, rows, metrics)
        return Measured(self.title, protocol, metrics, single, batched, units, predictions)

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scored:
        """Return the metrics by name from the outputs of all rows, and the value of `Measured.answers`."""
        raise NotImplementedError

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: Any, metrics: dict[str, Any]) -> str:
        """Return how the metrics were measured, in words. Figures compare only under the same protocol."""
        cut = f"{KEPT[setup.truncate]} {setup.seq_len} tokens"
        return f"{held.split} split, {len(held.examples)} examples, {cut}, {setup.dtype}"

    # --- export ------------------------------------------------------------------------------------------------------

    def hf_fields(self, model: ModelConfig, labels: Sequence[str], fitted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of Hugging Face's config.json that describe the outputs, from an artifact's manifest."""
        if not self.classes:
            return {}
        names = list(labels) or [f"LABEL_{i}" for i in range(model.labels)]
        fields = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        return fields | ({"problem_type": self.problem_type} if self.problem_type else {})

    def fitted_of(self, keys: Keys, labels: Sequence[str]) -> dict[str, Any]:
        """Take the values of `fit` that `hf_fields` wrote from the keys of a config.json, and return them."""
        return {}

    def peft_task_type(self, model: ModelConfig) -> str:
        """Return PEFT's `task_type` for a model of this task."""
        return "SEQ_2_SEQ_LM" if model.encoder_layers else self.peft_type


Network = tuple[ModelConfig, functional.Params, jax.Array]
"""A network, its parameters, and the hidden states [B, T, D] that it computed."""


def unlabelled(examples: Examples) -> Examples:
    """Return the examples with zeros as labels if they have none."""
    return examples if examples.labels is not None else replace(examples, labels=np.zeros(len(examples), np.int32))


def completes(model: ModelConfig, columns: Iterable[str]) -> bool:
    """Return whether a language model reads prompts and predicts completions; an encoder cannot."""
    return model.architecture != "encoder" and "completion" in columns
