"""Compute the loss and the metrics of a task, both summed over a batch.

`Losses` runs the network and reads the outputs of the task head. `TokenCrossEntropy` reads the logits of predicted
tokens instead.

Shapes: B rows, T tokens per row, P predicted positions per row, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from llmctl.evaluate.setup import Batch
from llmctl.evaluate.tasks.record import TaskRecord
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, SoftLoss, mean_logits
from llmctl.model.head_kinds import HEAD_KINDS
from llmctl.model.layer_signals import Signals
from llmctl.model.losses import COSINE_TEMPERATURE, Loss, Sums, class_sums, row_weight

Network = tuple[ModelConfig, functional.Params, jax.Array]
"""One of the two networks that a loss compares: (config, parameters, hidden states [B, T, D])."""


MOST_PROBABLE = Divergence(top_k=1)
"""Divergence to pass to `Losses.teacher_arrays` if `Losses.taught_agreement` will read the result."""


@dataclass(frozen=True)
class Options:
    """Configure the training or validation loss of a task."""

    dtype: Any = jnp.float32
    """Dtype of the computation."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the targets. The metrics are computed without label smoothing."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss, for the normalizer Z of the softmax. The metrics do not include this term."""
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

        By default, return the batch unchanged. A task with two texts per row returns one row per text.
        """
        return batch

    def loss_of(self, cfg: ModelConfig, *, remat: str = "none", **options: Any) -> Loss:
        """Return the loss function, which returns (loss, metrics), both summed over the batch.

        The arguments of the loss function are the parameters, a batch, and a dropout key or None.

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
        teacher_cfgs: Sequence[ModelConfig],
        how: SoftLoss,
        *,
        signals: Signals | None = None,
        dtype: Any = jnp.float32,
        remat: str = "none",
    ) -> Callable[..., tuple[jax.Array, Sums]]:
        """Return the distillation loss, a function whose result is (loss, metrics summed over the batch).

        The arguments of the loss are the student's parameters, a batch, a dropout key, and the parameters of each
        teacher. If `signals` is given, the loss has a further keyword argument `extra`: the result of
        `Signals.projections`.

        Args:
            cfg: Config of the student.
            teacher_cfgs: Config of each teacher. If the sequence is empty, each batch must contain the teachers' stored
                outputs (the arrays that `teacher_arrays` returns).
            how: Divergence from the teachers, and the weights of the divergence and of the loss on the labels.
            signals: Losses that compare inner layers of the student and its only teacher; None if there are no such
                losses.
            dtype: Dtype of the computation.
            remat: Rematerialization policy of the backward pass.
        """

        def loss(
            params: functional.Params, batch: Batch, key: jax.Array, *teachers: functional.Params
        ) -> tuple[jax.Array, Sums]:
            batch = self.model_inputs(batch)
            taught = [
                (own, teacher, jax.lax.stop_gradient(functional.hidden(own, teacher, batch, dtype=dtype)))
                for own, teacher in zip(teacher_cfgs, teachers, strict=True)
            ]
            x_BTD = functional.hidden(cfg, params, batch, train=True, rng=key, dtype=dtype, remat=remat)
            if not taught:
                return self.taught_loss((cfg, params, x_BTD), batch, dtype, weighted(how, batch))
            return self.soft_loss((cfg, params, x_BTD), taught, batch, dtype, weighted(how, batch))

        def inner_loss(
            params: functional.Params,
            batch: Batch,
            key: jax.Array,
            teacher: functional.Params,
            extra: functional.Params | None = None,  # no projections if the widths are equal
        ) -> tuple[jax.Array, Sums]:
            batch, (teacher_cfg,), wanted = self.model_inputs(batch), teacher_cfgs, cast(Signals, signals)
            y_BTE, theirs = wanted.read(teacher_cfg, teacher, batch, "teacher", dtype=dtype)
            y_BTE = jax.lax.stop_gradient(y_BTE)
            x_BTD, own = wanted.read(cfg, params, batch, "student", train=True, rng=key, dtype=dtype, remat=remat)
            networks = (cfg, params, x_BTD), [(teacher_cfg, teacher, y_BTE)]
            total, sums = self.soft_loss(*networks, batch, dtype, weighted(how, batch))
            # These losses are means over tokens. The step divides by the sum "weight".
            found = wanted.losses(own, theirs, batch["segments"], extra or {})
            weights = {name: signal_weight(batch, name, wanted.weight(name)) for name in found}
            total += sums["weight"] * sum(weights[name] * value for name, value in found.items())
            return total, sums | {name: sums["weight"] * value for name, value in found.items()}

        return inner_loss if signals else loss

    def soft_loss(
        self, student: Network, teachers: Sequence[Network], batch: Batch, dtype: Any, how: SoftLoss
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the summed metrics, from the hidden states of all networks."""
        taught = self.teacher_arrays(teachers, batch, dtype, how.divergence)
        return self.taught_loss(student, batch | taught, dtype, how)

    def teacher_arrays(
        self, teachers: Sequence[Network], batch: Batch, dtype: Any, divergence: Divergence
    ) -> dict[str, jax.Array]:
        """Return the teachers' outputs that the loss reads, as arrays for a cache or a batch.

        By default, the result is the mean output of the task heads, {"teacher_outputs": [B, ...]}. If the head has one
        output per token, the name is "teacher_token_outputs".

        Args:
            teachers: Configs, parameters and hidden states of the teachers.
            batch: Batch that the teachers read.
            dtype: Dtype of the computation.
            divergence: Divergence that reads the arrays.
        """
        outputs = [functional.outputs(cfg, params, x, batch, dtype) for cfg, params, x in teachers]
        mean = self.mean_output(outputs, batch, divergence.temperature)
        return {f"teacher_{'token_' * HEAD_KINDS[self.head].per_token}outputs": mean}

    def taught_loss(self, student: Network, batch: Batch, dtype: Any, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the summed metrics. The batch contains the teachers' outputs
        (`teacher_arrays`)."""
        return self.soft_score(_taught(batch), functional.outputs(*student, batch, dtype), batch, how)

    def mean_output(self, outputs: Sequence[jax.Array], batch: Batch, temperature: float) -> jax.Array:
        """Return an output of the task head whose prediction is the mean of several teachers' predictions.

        By default, outputs are logits of classes, and the class probabilities at `temperature` are averaged.
        """
        return mean_logits(outputs, temperature)

    def soft_score(self, teacher: jax.Array, y: jax.Array, batch: Batch, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the summed metrics, from the outputs of both task heads."""
        raise NotImplementedError

    def divergence(self, one: Network, other: Network, batch: Batch, dtype: Any) -> jax.Array:
        """Return the symmetric divergence between the outputs of two networks, summed like the loss.

        For class outputs, the divergence is the mean of the two KL divergences in nats. For numbers, the divergence is
        the squared difference. Gradients flow into both networks.
        """
        y, z = (functional.outputs(cfg, params, x, batch, dtype) for cfg, params, x in (one, other))
        how = SoftLoss(Divergence(), 1.0, 0.0)
        there, back = (self.soft_score(a, b, batch, how)[0] for a, b in ((y, z), (z, y)))
        return (there + back) / 2

    def agreement(self, student: Network, teachers: Sequence[Network], batch: Batch, dtype: Any) -> Sums:
        """Return the sums "agreement" and "weight". The first sum divided by the second is the fraction of labels that
        student and teachers predict equally.

        The predictions of several teachers are averaged. The result is {} if the outputs are numbers or vectors.
        """
        taught = self.teacher_arrays(teachers, batch, dtype, MOST_PROBABLE)
        return self.taught_agreement(student, batch | taught, dtype)

    def taught_agreement(self, student: Network, batch: Batch, dtype: Any) -> Sums:
        """Return the sums "agreement" and "weight", or {} (see `agreement`), for a batch that contains the teachers'
        outputs.

        The teachers' outputs are the result of `teacher_arrays` with the divergence `MOST_PROBABLE`.
        """
        labels = self.decided(_taught(batch), batch)
        if not labels:
            return {}
        _, sums = self.score(functional.outputs(*student, batch, dtype), batch | labels, Options())
        return {"agreement": sums["exact_match" if "exact_match" in sums else "accuracy"], "weight": sums["weight"]}

    def decided(self, y: jax.Array, batch: Batch) -> Batch:
        """Return the labels that the outputs of the task head predict, such as {"label": classes}.

        The keys are the names of the true labels in a batch. For numbers and vectors, and by default, the result is {}.
        """
        return {}

    def weighted(self, batch: Batch, weight_C: jax.Array) -> Batch:
        """Multiply the loss weight of each row, or of each word, by the weight of its class. Return the batch.

        Only tasks with one class per row or per word define this method.

        Args:
            batch: Batch with labels.
            weight_C: Weight of each class.
        """
        raise NotImplementedError


class TokenCrossEntropy(Losses):
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


def project(cfg: ModelConfig, dtype: Any) -> chunked_loss.Project:
    """Return the function that computes logits in the chunked losses.

    Its arguments are the result of `functional.head_params`, and hidden states.
    """
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


def _taught(batch: Batch) -> jax.Array:
    """Return the mean output of the teachers' task heads, which `Losses.teacher_arrays` added to the batch."""
    return batch["teacher_outputs"] if "teacher_outputs" in batch else batch["teacher_token_outputs"]


def signal_weight(batch: Batch, name: str, weight: float) -> Any:
    """Return the factor of one term of the distillation loss (a signal) in the current step.

    If the factor changes during training, the array "signal_NAME" [B] of the batch contains it. Otherwise it is
    `weight`.
    """
    return jnp.max(batch[f"signal_{name}"]) if f"signal_{name}" in batch else weight


def weighted(how: SoftLoss, batch: Batch) -> SoftLoss:
    """Return the settings `how` of the distillation loss, with the factors of its two terms in the current step."""
    return replace(how, soft=signal_weight(batch, "logits", how.soft), hard=signal_weight(batch, "hard", how.hard))
