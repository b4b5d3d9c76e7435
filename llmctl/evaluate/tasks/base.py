"""Define the base class of tasks. A task defines the rows, the loss, the metrics and the predictions of a model head.

A new task is a subclass whose instance is registered in `llmctl.evaluate.tasks.registry`. The subclass overrides
methods:

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
from llmctl.config.settings import TrainConfig
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
"""Function from a tokenizer to the cached tokens of the examples' texts."""
Found = Iterable[tuple[Batch, Any]]
"""Batches on the host with the model's outputs for them. Each row occurs exactly once; padding rows are removed."""
Scored = (
    tuple[dict[str, Any], tuple[Any, Any] | None] | tuple[dict[str, Any], tuple[Any, Any] | None, list[dict[str, Any]]]
)
"""Metrics by name; (true labels, predictions) of all examples, or None if the task returns none; and, if the task has
any, the records of predictions.jsonl."""

KINDS = {"class": "classes", "number": "numbers", "set": "sets of classes"}
"""Words for the labels in error messages, by `data.label_type`."""


@dataclass(frozen=True)
class Options:
    """Configure a training or validation loss."""

    dtype: Any = jnp.float32
    """Dtype of the computation."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the targets; the metrics do not use it."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss; the metrics do not use it."""
    temperature: float = NEARNESS
    """Divisor of the similarities of embeddings before the softmax."""
    labels: Sequence[str] = ()
    """Class names, for validation metrics that need them."""
    settings: Any = None
    """Section of the finetuning settings that belongs to the task (`Task.section`)."""


class Task(Predicts):
    """Describe one task by class attributes and methods.

    The defaults are those of tasks that read one text, or a pair of texts, per row.

    Example:
        >>> from llmctl.evaluate.tasks.registry import TASKS
        >>> TASKS["classify"].head, TASKS["classify"].best(["no", "yes"])
        ('classify', 'accuracy')
    """

    name: ClassVar[str]
    """Name in the registry of tasks."""
    head: ClassVar[str]
    """Model head that the task needs, a key of `llmctl.model.head_kinds.HEAD_KINDS`."""
    title: ClassVar[str]
    """Name of the task in the results of an evaluation."""
    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder")
    """Model architectures that support the task."""
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    """Canonical column names (see `data.columns`) that labelled rows must have."""
    columns_read: ClassVar[tuple[str, ...]] = ()
    """Canonical columns that rows without labels must have; if empty, one text column is enough."""
    label_type: ClassVar[str] = ""
    """Required value of `data.label_type`; empty accepts every value."""
    classes: ClassVar[bool] = False
    """Whether labels are classes. The model then has one output per class, and the artifact stores the class names."""
    reads_conversations: ClassVar[bool] = False
    """Whether the task's rows are conversations, from the columns messages and tools."""
    calibrates: ClassVar[bool] = False
    """Whether `calibrated` can scale the probabilities of the classes."""
    pooling: ClassVar[str] = ""
    """Default pooling of hidden states to one vector per sequence; empty keeps the pooling of the model."""
    section: ClassVar[str] = ""
    """Name of the section of `finetune` with the settings of this task; empty if it has none."""
    answers: ClassVar[bool] = True
    """Whether `metrics` also returns true labels and predictions, which user-selected metrics need."""
    reads: ClassVar[tuple[str, ...]] = READ
    """Names of the batch arrays that `scorer` reads; empty means all."""
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    """Value of `task_type` in a PEFT adapter's config."""
    problem_type: ClassVar[str] = ""
    """Value of `problem_type` in Hugging Face's config.json; empty omits the field."""

    def head_for(self, model: ModelConfig) -> str:
        """Return the head that a model of this architecture needs, a key of `HEAD_KINDS`."""
        return self.head

    # --- data --------------------------------------------------------------------------------------------------------

    @property
    def reads_labels(self) -> bool:
        """Return True if the task's rows have labels. Language-modelling tasks have none."""
        return not HEAD_KINDS[self.head].vocabulary

    def check_data(self, data: DataConfig, labels: Sequence[str]) -> None:
        """Check the data of a training stage.

        Raises:
            RequestError: If the label type is wrong, or if there are fewer than two classes.
        """
        self.check_label_type(data)
        if self.classes and len(labels) < 2:
            raise RequestError(f"classification needs two classes at least, the data has {len(labels)}")

    def tokenizer_dir(self, folder: Path, settings: Any, work: Path) -> Path:
        """Return the folder of the tokenizer that a finetuned artifact gets.

        Args:
            folder: Folder of the parent's tokenizer, which is returned if the task changes nothing.
            settings: The task's own settings (`section`).
            work: Folder to write a changed tokenizer to.

        Raises:
            RequestError: If the tokenizer lacks what the task needs.
        """
        return folder

    def check_method(self, adapts: bool, options: Options) -> None:
        """Check that the task can be trained with a finetuning method.

        Args:
            adapts: Whether the method adds adapters to a frozen model.
            options: Settings of the loss.

        Raises:
            RequestError: If the method does not suit the task.
        """

    def extra_passes(self, settings: Any) -> int:
        """Return the number of forward passes per training step in addition to the one that is differentiated.

        Args:
            settings: The task's own settings (`section`).
        """
        return 0

    def reads_adapters(self, settings: Any) -> bool:
        """Return True if the loss compares the model with and without its adapters, so that merging is not possible.

        Args:
            settings: The task's own settings (`section`).
        """
        return False

    def check_label_type(self, data: DataConfig) -> None:
        """Check that `data.label_type` is the type that the task needs.

        Raises:
            RequestError: If the label type differs.
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
        """Return tokenized rows with labels, for training and evaluation.

        Args:
            model: Config of the model.
            examples: Examples with the task's columns.
            tokenizer: Tokenizer of the model.
            seq_len: Maximum number of tokens per row.
            seed: Seed of the shuffle.
            shuffle: Whether to shuffle the rows in each epoch.
            truncate: Truncation mode, which selects the part of a long text that is kept.
            corpus: Function that returns cached tokens of the texts.

        Raises:
            RequestError: If the data lacks a column.
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
        """Return additional arguments of `rows` from the data settings of a stage."""
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
        """Return the rows of a split of the data, and check that there are enough for a stage that reads `needed` rows.

        Raises:
            RequestError: If `rows` raises it, or if `needed` exceeds the number of rows times the allowed epochs
                (`data.epochs`).
        """
        how = {"seed": seed, "shuffle": shuffle, "truncate": truncate, **self.row_settings(text)}
        rows = self.rows(model, text.splits[split], tokenizer, seq_len, **how)
        if text.epochs:
            check_epochs(needed, round(text.epochs * len(rows)))
        return rows

    def reading_rows(
        self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, seq_len: int, *, truncate: Truncate = "tail"
    ) -> Any:
        """Return rows without labels for calibration: one text, or one pair of texts, per row."""
        return ClassificationRows(unlabelled(examples), tokenizer, seq_len, truncate=truncate, shuffle=False)

    # --- training ----------------------------------------------------------------------------------------------------

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return the name of the validation metric that selects the best checkpoint."""
        return "loss"

    def woven(self, batch: Batch) -> Batch:
        """Return the batch with arrays of the shapes that the network reads.

        By default, return the batch unchanged. Tasks with two texts per row make two rows of them.
        """
        return batch

    def loss_of(self, cfg: ModelConfig, *, remat: str = "none", **options: Any) -> Loss:
        """Return the loss function (params, batch, dropout key or None) -> (sum of losses, metric sums).

        Args:
            cfg: Config of the network.
            remat: Rematerialization policy of the backward pass.
            **options: Fields of `Options`.
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
        """Return the summed loss and the metric sums, from hidden states [B, T, D]."""
        return self.score(functional.outputs(cfg, params, x_BTD, batch, options.dtype), batch, options)

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the summed loss and the metric sums, from the outputs of the task head."""
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
        """Return the distillation loss (student's params, batch, dropout key, teacher's params) -> (loss, metric sums).

        Args:
            cfg: Config of the student.
            teacher_cfg: Config of the teacher.
            dtype: Dtype of the computation.
            remat: Rematerialization policy of the backward pass.
            temperature: Softmax temperature of both distributions.
            hard: Weight of the loss on labels; 1 - hard is the weight of the KL divergence from the teacher.
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
        """Return the distillation loss and the metric sums, from the hidden states of both networks."""
        cfg, params, x = teacher
        taught = functional.outputs(cfg, params, x, batch, dtype)
        cfg, params, x = student
        return self.soft_score(taught, functional.outputs(cfg, params, x, batch, dtype), batch, temperature, hard)

    def soft_score(
        self, teacher: jax.Array, y: jax.Array, batch: Batch, temperature: float, hard: float
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the metric sums, from the outputs of both task heads."""
        raise NotImplementedError

    def divergence(self, one: Network, other: Network, batch: Batch, dtype: Any) -> jax.Array:
        """Return the symmetric divergence between the outputs of two networks, summed like the loss.

        For class outputs, it is the mean of the two KL divergences in nats. For numbers, it is the squared difference.
        Gradients flow into both networks.
        """
        y, z = (functional.outputs(cfg, params, x, batch, dtype) for cfg, params, x in (one, other))
        there, back = (self.soft_score(a, b, batch, 1.0, 0.0)[0] for a, b in ((y, z), (z, y)))
        return (there + back) / 2

    def weighted(self, batch: Batch, weight_C: jax.Array) -> Batch:
        """Return the batch with each row, or each word, weighted by its class.

        Only tasks with one class per row or per word define this method.

        Args:
            batch: Batch with labels.
            weight_C: Weight of each class.
        """
        raise NotImplementedError

    def validator(
        self,
        model: ModelConfig,
        text: Text,
        tokenizer: Tokenizer,
        settings: Any,
        train: TrainConfig,
        ends: Sequence[int],
    ) -> Callable[[functional.Params, Callable[[], None]], dict[str, float]] | None:
        """Return a function that computes further validation metrics during training; None if there are none.

        The function takes (parameters, check_stop). It must call `check_stop()` often, which raises an exception if
        training must stop.

        Args:
            model: Config of the model.
            text: Text of the stage.
            tokenizer: Tokenizer of the model.
            settings: The task's own settings (`section`).
            train: Settings of training.
            ends: Tokens that end an answer.

        Raises:
            RequestError: If the metrics cannot be computed.
        """
        return None

    def calibrated(
        self, model: ModelConfig, params: functional.Params, rows: Rows, setup: Setup
    ) -> tuple[functional.Params, dict[str, Any]]:
        """Return parameters whose probabilities are calibrated on `rows`, and metrics about it.

        Only tasks with `calibrates` define it.
        """
        raise NotImplementedError

    def fit(self, model: ModelConfig, params: functional.Params, rows: Rows, setup: Setup) -> dict[str, Any]:
        """Return values that are fitted on validation rows after training, such as thresholds; {} if there are none.

        The artifact stores them as `fitted`.
        """
        return {}

    def validation_note(self, model: ModelConfig, rows: Rows) -> str:
        """Return a note on how validation in training differs from `evaluate`, or "" if it does not differ."""
        return ""

    # --- evaluation --------------------------------------------------------------------------------------------------

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
            RequestError: If the data lacks a column, or has labels that are not the model's.
        """

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return the compiled function (params, batch) -> outputs that `eval` runs and times."""
        raise NotImplementedError

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure an artifact on held-out examples. Each row is used exactly once.

        Raises:
            RequestError: If `check_examples` rejects the data.
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
        metrics, predictions, *written = self.metrics(artifact, held.examples, rows, found)
        single, batched = programs(step, artifact.params, first(rows, setup, self.reads), setup.mesh)
        units = {"examples_per_second": setup.batch_size}
        protocol = self.protocol(artifact, held, setup, rows, metrics)
        return Measured(
            self.title, protocol, metrics, single, batched, units, predictions, written[0] if written else None
        )

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scored:
        """Compute metrics from the model's outputs.

        Args:
            artifact: The evaluated artifact.
            examples: Held-out examples.
            rows: Rows of the examples.
            found: Host batches with the model's outputs.

        Returns:
            Metrics by name, and (truth, predictions) of all examples, or None if the task has none.
        """
        raise NotImplementedError

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: Any, metrics: dict[str, Any]) -> str:
        """Return a description of the measurement: split, number of examples, truncation and dtype.

        Metrics are comparable only if their descriptions are equal.
        """
        cut = f"{KEPT[setup.truncate]} {setup.seq_len} tokens"
        return f"{held.split} split, {len(held.examples)} examples, {cut}, {setup.dtype}"

    # --- export ------------------------------------------------------------------------------------------------------

    def hf_fields(self, model: ModelConfig, labels: Sequence[str], fitted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of Hugging Face's config.json that describe the outputs, such as `id2label`.

        Args:
            model: Config of the model.
            labels: Class names.
            fitted: Values that `fit` returned.
        """
        if not self.classes:
            return {}
        names = list(labels) or [f"LABEL_{i}" for i in range(model.labels)]
        fields = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        return fields | ({"problem_type": self.problem_type} if self.problem_type else {})

    def fitted_of(self, keys: Keys, labels: Sequence[str]) -> dict[str, Any]:
        """Remove the fitted values from the keys of a config.json, and return them in the form that `fit` returns."""
        return {}

    def peft_task_type(self, model: ModelConfig) -> str:
        """Return PEFT's `task_type` for a model of this task."""
        return "SEQ_2_SEQ_LM" if model.encoder_layers else self.peft_type


Network = tuple[ModelConfig, functional.Params, jax.Array]
"""One network of a loss that compares two: (config, parameters, hidden states [B, T, D])."""


def unlabelled(examples: Examples) -> Examples:
    """Return the examples. If they have no labels, return them with all labels set to 0."""
    return examples if examples.labels is not None else replace(examples, labels=np.zeros(len(examples), np.int32))


def completes(model: ModelConfig, columns: Iterable[str]) -> bool:
    """Return True if a model is trained on completions: it has a decoder, and the data has the column "completion"."""
    return model.architecture != "encoder" and "completion" in columns
