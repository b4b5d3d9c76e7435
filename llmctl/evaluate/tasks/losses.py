"""Compute the loss and the metrics of a task, both summed over a batch.

`Losses` runs the network and reads the outputs of the task head. `TokenLosses` reads the logits of predicted tokens
instead; all language-modelling tasks inherit it.

Shapes: B rows, T tokens per row, P predicted positions per row, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.evaluate.setup import Batch
from llmctl.evaluate.tasks.record import TaskRecord
from llmctl.model import chunked_divergence, chunked_loss, functional
from llmctl.model.config import ModelConfig
from llmctl.model.losses import COSINE_TEMPERATURE, Loss, Sums, class_sums, row_weight, soft_class_sums

Network = tuple[ModelConfig, functional.Params, jax.Array]
"""One of the two networks that a loss compares: (config, parameters, hidden states [B, T, D])."""


@dataclass(frozen=True)
class Options:
    """Configure the training or validation loss of a task."""

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


class Losses(TaskRecord):
    """Define the methods of a task that compute its loss, its distillation loss, and the divergence of two networks."""

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


class TokenLosses(Losses):
    """Compute cross-entropy over tokens, and over next-sentence labels if the model predicts them."""

    def loss(
        self, cfg: ModelConfig, params: functional.Params, x_BTD: jax.Array, batch: Batch, options: Options
    ) -> tuple[jax.Array, Sums]:
        """Return the summed cross-entropy at the predicted positions, and the metrics summed over the batch.

        Logits are computed in chunks to save memory.
        """
        smoothing, z = options.label_smoothing, options.z_loss
        head = functional.head_params(cfg, params)
        x_BPD, targets_BP, weights_BP = predicted(batch, x_BTD)
        total, sums = chunked_loss.cross_entropy(
            project(cfg, options.dtype), head, x_BPD, targets_BP, weights_BP, cfg.vocab_size, smoothing, z
        )
        found = {"loss": sums["nll"], "accuracy": sums["correct"], "weight": sums["weight"]}
        if not (cfg.next_sentence and "next_label" in batch):
            return total, found
        logits_B2 = functional.outputs(cfg, params, x_BTD, batch, options.dtype)
        label_B = batch["next_label"]
        follows, sums = class_sums(logits_B2, label_B, row_weight(batch, label_B) * (label_B >= 0), smoothing, z)
        # The step divides by the number of masked tokens: a pair counts as much as the masked tokens of a row.
        return total + targets_BP.shape[1] * follows, found | {f"next_sentence_{k}": v for k, v in sums.items()}

    def soft_loss(
        self, student: Network, teacher: Network, batch: Batch, dtype: Any, temperature: float, hard: float
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss, and the metrics summed over the batch.

        The loss is (1 - hard) * KL divergence + hard * cross-entropy, summed over tokens. If both networks predict
        next-sentence labels, the loss also sums over these labels.
        """
        (cfg, params, x_BTD), (teacher_cfg, teacher_params, taught_BTE) = student, teacher
        x_BPD, targets_BP, weights_BP = predicted(batch, x_BTD)
        total, sums = chunked_divergence.distillation(
            project(cfg, dtype), functional.head_params(cfg, params), x_BPD,
            project(teacher_cfg, dtype), functional.head_params(teacher_cfg, teacher_params),
            predicted(batch, taught_BTE)[0], targets_BP, weights_BP, cfg.vocab_size, temperature, hard,
        )  # fmt: skip
        found = {"loss": sums["nll"], "kl": sums["kl"], "accuracy": sums["correct"], "weight": sums["weight"]}
        if not (cfg.next_sentence and teacher_cfg.next_sentence and "next_label" in batch):
            return total, found
        soft_B2 = functional.outputs(teacher_cfg, teacher_params, taught_BTE, batch, dtype)
        label_B = batch["next_label"]
        follows, sums = soft_class_sums(
            soft_B2, functional.outputs(cfg, params, x_BTD, batch, dtype), label_B,
            row_weight(batch, label_B) * (label_B >= 0), temperature, hard,
        )  # fmt: skip
        return total + targets_BP.shape[1] * follows, found | {f"next_sentence_{k}": v for k, v in sums.items()}

    def divergence(self, one: Network, other: Network, batch: Batch, dtype: Any) -> jax.Array:
        """Return the symmetric divergence at the predicted positions, computed in chunks (see `Task.divergence`)."""
        (cfg, params, x_BTD), (other_cfg, other_params, other_BTD) = one, other
        x_BPD, _, weights_BP = predicted(batch, x_BTD)
        heads = functional.head_params(cfg, params), functional.head_params(other_cfg, other_params)
        other_BPD = predicted(batch, other_BTD)[0]
        return chunked_divergence.symmetric_divergence(
            project(cfg, dtype), heads, x_BPD, other_BPD, weights_BP, cfg.vocab_size
        )


def project(cfg: ModelConfig, dtype: Any) -> chunked_loss.Project:
    """Return the function (result of `functional.head_params`, hidden states) -> logits, for the chunked losses."""
    return lambda head, x: functional.head_logits(cfg, head, x, dtype)


def predicted(batch: Batch, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (hidden states, targets, weights) at the predicted positions.

    If the batch has `places` [B, P], only these positions are predicted. The output projection then runs over P instead
    of T tokens per row. In a small encoder, this projection costs more than all layers.
    """
    targets_BT, weights_BT = batch["targets"], batch["weights"]
    if "places" not in batch:
        return x_BTD, targets_BT, weights_BT
    at_BP = batch["places"]
    x_BPD = jnp.take_along_axis(x_BTD, at_BP[..., None], axis=1)
    return x_BPD, jnp.take_along_axis(targets_BT, at_BP, axis=1), jnp.take_along_axis(weights_BT, at_BP, axis=1)
