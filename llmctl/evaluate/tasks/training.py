"""Define how a task is trained: losses, distillation losses, and the methods that a finetuning stage calls.

Shapes: B rows, T tokens per row, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.config.settings import TrainConfig
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.setup import Batch, Setup
from llmctl.evaluate.tasks.record import TaskRecord
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.losses import COSINE_TEMPERATURE, Loss, Sums
from llmctl.model.program import Program

if TYPE_CHECKING:
    from llmctl.data.device_batches import Rows

Network = tuple[ModelConfig, functional.Params, jax.Array]
"""One of the two networks that a loss compares: (config, parameters, hidden states [B, T, D])."""


@dataclass(frozen=True)
class Options:
    """Configure a training or validation loss."""

    dtype: Any = jnp.float32
    """Dtype of the computation."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the targets; the metrics do not use it."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss, for the normalizer Z of the softmax; the metrics do not use it."""
    temperature: float = COSINE_TEMPERATURE
    """Divisor of the similarities of embeddings before the softmax."""
    labels: Sequence[str] = ()
    """Class names, for validation metrics that need them."""
    settings: Any = None
    """Section of the finetuning settings that belongs to the task (`Task.section`)."""


class TrainingMethods(TaskRecord):
    """Define the methods of a task that stages call to train it."""

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

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return the name of the validation metric that selects the best checkpoint."""
        return "loss"

    def model_inputs(self, batch: Batch) -> Batch:
        """Return the batch with arrays of the shapes that the network reads.

        By default, return the batch unchanged. Tasks with two texts per row make two rows of them.
        """
        return batch

    def loss_of(self, cfg: ModelConfig, *, remat: str = "none", **options: Any) -> Loss:
        """Return the loss function (params, batch, dropout key or None) -> (loss, metrics), both summed over the batch.

        Args:
            cfg: Config of the network.
            remat: Rematerialization policy of the backward pass.
            **options: Fields of `Options`.
        """
        settings = Options(**options)

        def loss(params: functional.Params, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
            batch = self.model_inputs(batch)
            x_BTD = functional.hidden(
                cfg, params, batch, train=key is not None, rng=key, dtype=settings.dtype, remat=remat
            )
            return self.loss(cfg, params, x_BTD, batch, settings)

        return loss

    def loss(
        self, cfg: ModelConfig, params: functional.Params, x_BTD: jax.Array, batch: Batch, options: Options
    ) -> tuple[jax.Array, Sums]:
        """Return the loss and the metrics, both summed over the batch, from hidden states [B, T, D]."""
        return self.score(functional.outputs(cfg, params, x_BTD, batch, options.dtype), batch, options)

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the loss and the metrics, both summed over the batch, from the outputs of the task head."""
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
        """Return the distillation loss, a function whose result is (loss, metrics summed over the batch).

        Its arguments are the student's parameters, a batch, a dropout key, and the teacher's parameters.

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
            batch = self.model_inputs(batch)
            taught_BTE = jax.lax.stop_gradient(functional.hidden(teacher_cfg, teacher, batch, dtype=dtype))
            x_BTD = functional.hidden(cfg, params, batch, train=True, rng=key, dtype=dtype, remat=remat)
            student, taught = (cfg, params, x_BTD), (teacher_cfg, teacher, taught_BTE)
            return self.soft_loss(student, taught, batch, dtype, temperature, hard)

        return loss

    def soft_loss(
        self, student: Network, teacher: Network, batch: Batch, dtype: Any, temperature: float, hard: float
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the summed metrics, from the hidden states of both networks."""
        cfg, params, x = teacher
        taught = functional.outputs(cfg, params, x, batch, dtype)
        cfg, params, x = student
        return self.soft_score(taught, functional.outputs(cfg, params, x, batch, dtype), batch, temperature, hard)

    def soft_score(
        self, teacher: jax.Array, y: jax.Array, batch: Batch, temperature: float, hard: float
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the summed metrics, from the outputs of both task heads."""
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

        The function takes (parameters, check_stop). It must call `check_stop()` often. `check_stop` raises an exception
        if training must stop.

        Args:
            model: Config of the model.
            text: The stage's data.
            tokenizer: Tokenizer of the model.
            settings: The task's own settings (`section`).
            train: Settings of training.
            ends: Tokens that end an answer.

        Raises:
            RequestError: If the metrics cannot be computed.
        """
        return None

    def generation_programs(
        self,
        model: ModelConfig,
        params: functional.Params,
        settings: Any,
        mesh: Mesh,
        *,
        seq_len: int,
        batch_size: int,
        dtype: str,
    ) -> list[Program]:
        """Return the programs that generate answers in validation and evaluation; [] if the task generates none.

        Args:
            model: Config of the model.
            params: Abstract parameters of the model.
            settings: Settings of generated answers.
            mesh: The device mesh.
            seq_len: Maximum number of tokens per prompt.
            batch_size: Number of prompts per batch.
            dtype: Dtype of the computation.
        """
        return []

    def calibrated(
        self, model: ModelConfig, params: functional.Params, rows: Rows, setup: Setup
    ) -> tuple[functional.Params, dict[str, Any]]:
        """Return parameters whose probabilities are calibrated on `rows`, and metrics of the calibration.

        Only tasks whose `calibrates` is true define this method.
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
