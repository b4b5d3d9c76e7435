"""Compute losses of tasks, and sums for their metrics: cross-entropy, squared error and divergences.

`chunked_loss.means` converts sums to metrics, by dividing them by the sum "weight". Because sums are added over
batches, microbatches and devices before this division, the means are exact.

Shapes: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmctl.model import chunked_loss
from llmctl.model.divergences import EXCLUDED_LOGIT, SoftLoss
from llmctl.model.transformer import Batch

Sums = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Sums]]
"""Function of parameters, a batch and a dropout key (None by default).

The results are the sum of losses, and a dictionary with one sum per metric and the sum "weight". With a dropout key,
the function computes the training loss; without a key, the validation loss.
"""

COSINE_TEMPERATURE = 0.05
"""Default divisor of cosine similarities before a softmax. Without this divisor, the softmax could not assign a high
probability to one class, because cosines are at most 1."""


def number_sums(y_B: jax.Array, label_B: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, Sums]:
    """Return the weighted sum of squared errors, and the sums for metrics.

    The sums are "loss" (squared errors), "error" (absolute errors) and "weight".

    Args:
        y_B: Predicted numbers.
        label_B: True numbers.
        weight_B: Weights of the examples.
    """
    off_B = y_B - label_B
    loss = jnp.sum(jnp.square(off_B) * weight_B)
    return loss, {"loss": loss, "error": jnp.sum(jnp.abs(off_B) * weight_B), "weight": jnp.sum(weight_B)}


def row_weight(batch: Batch, label_B: jax.Array) -> jax.Array:
    """Return the weight of each row, float32 [B]: 1 for an example, 0 for a row that only fills the batch.

    The result is the array "row_weight" of the batch; if there is none, all weights are 1. `label_B` is any array with
    one element per row; only the length is used.
    """
    return batch["row_weight"] if "row_weight" in batch else jnp.ones(label_B.shape[:1], jnp.float32)


def class_sums(
    logits_BC: jax.Array,
    label_B: jax.Array,
    weight_B: jax.Array,
    smoothing: float = 0.0,
    z: float = 0.0,
    among: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Return the loss, a weighted sum of cross-entropies in nats, and the sums "loss", "accuracy" and "weight".

    Args:
        logits_BC: Logits of the classes. There may be further axes between B and C.
        label_B: True classes.
        weight_B: Weights of the examples.
        smoothing: Weight of the uniform distribution in the targets. The sum "loss" does not use label smoothing.
        z: Coefficient of log(Z)^2 in the loss. The sum "loss" does not use this term.
        among: 1 for possible classes, 0 for excluded classes, broadcast to the logits; None excludes no class.
    """
    allowed = None if among is None else jnp.broadcast_to(among, logits_BC.shape) > 0
    logits_BC = only(logits_BC, among)
    log_p, partition_B = chunked_loss.target_log_probability(logits_BC, label_B)
    nll_B = -log_p
    loss_B = (1 - smoothing) * nll_B + smoothing * (partition_B - jnp.mean(logits_BC, axis=-1, where=allowed))
    loss_B = loss_B + z * jnp.square(partition_B)
    hit_B = jnp.argmax(logits_BC, axis=-1) == label_B
    sums = {"loss": jnp.sum(nll_B * weight_B), "accuracy": jnp.sum(hit_B * weight_B), "weight": jnp.sum(weight_B)}
    return jnp.sum(loss_B * weight_B), sums


def only(logits_BC: jax.Array, among: jax.Array | None) -> jax.Array:
    """Replace the logits of classes for which `among` is 0 by EXCLUDED_LOGIT. If `among` is None, change nothing."""
    return logits_BC if among is None else jnp.where(among > 0, logits_BC, EXCLUDED_LOGIT)


def soft_class_sums(
    teacher_BC: jax.Array,
    logits_BC: jax.Array,
    label_B: jax.Array,
    weight_B: jax.Array,
    how: SoftLoss,
    among: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Return a classifier's distillation loss: a weighted sum of the cross-entropy and of the divergence from the
    teacher.

    Args:
        teacher_BC: Logits of the teacher.
        logits_BC: Logits of the student.
        label_B: True classes.
        weight_B: Weights of the examples.
        how: Divergence, and the weights of divergence and cross-entropy.
        among: 1 for possible classes, 0 for excluded classes, broadcast to the logits; None excludes no class.

    Returns:
        (loss, sums over the examples). The sums are "loss", "accuracy" and "weight", as in `class_sums`, and the
        divergence, named by `Divergence.metric`.
    """
    nll, sums = class_sums(logits_BC, label_B, weight_B, among=among)
    apart = jnp.sum(how.divergence.between(only(teacher_BC, among), only(logits_BC, among)) * weight_B)
    return how.combined(apart, nll), sums | {how.divergence.metric: apart}


def soft_number_sums(
    teacher_B: jax.Array, y_B: jax.Array, label_B: jax.Array, weight_B: jax.Array, how: SoftLoss
) -> tuple[jax.Array, Sums]:
    """Return the distillation loss of a regression.

    The loss has two terms: the squared differences from the teacher's numbers, and those from the labels. Both terms
    are weighted sums over the rows. `how.soft` and `how.hard` are the weights of the two terms; the divergence of `how`
    is not used.

    Returns:
        (loss, sums). The sums are the same as in `number_sums`, for the labels.
    """
    taught, _ = number_sums(y_B, teacher_B, weight_B)
    loss, sums = number_sums(y_B, label_B, weight_B)
    return how.combined(taught, loss), sums
