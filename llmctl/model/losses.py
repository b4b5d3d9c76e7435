"""Compute the sums for the losses of tasks: cross-entropy of classes, squared error of numbers, divergences.

A metric is its sum divided by the sum of "weight" (`chunked_loss.means`). Means over batches, microbatches and devices
are therefore exact.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmctl.model import chunked_loss
from llmctl.model.transformer import Batch

Sums = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Sums]]
"""Function (params, batch, key=None) -> (sum of losses, sums by metric name and "weight").

With a dropout key, it computes a training loss; without one, a validation loss.
"""

IMPOSSIBLE = -1e30
"""Logit of an excluded class. It is finite, so that the difference of two such logits is defined."""
NEARNESS = 0.05
"""Divisor of cosine similarities, so that a softmax over them can assign a high probability to one class."""


def number_sums(y_B: jax.Array, label_B: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, Sums]:
    """Return the summed squared error, and the sums "loss", "error" (absolute error) and "weight"."""
    off_B = y_B - label_B
    loss = jnp.sum(jnp.square(off_B) * weight_B)
    return loss, {"loss": loss, "error": jnp.sum(jnp.abs(off_B) * weight_B), "weight": jnp.sum(weight_B)}


def row_weight(batch: Batch, label_B: jax.Array) -> jax.Array:
    """Return the weight of each row, float32 [B]: 1 for an example, 0 for a padding row.

    `label_B` is any array of the rows; only its length is used.
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
    """Return the summed cross-entropy (nats) of class logits, and the sums "loss", "accuracy" and "weight".

    Smoothing and z-loss do not change the sums. Between B and C there may be other axes. If `among` is given, classes
    where it is 0 are excluded.
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
    """Return the logits, with IMPOSSIBLE where `among` is 0."""
    return logits_BC if among is None else jnp.where(among > 0, logits_BC, IMPOSSIBLE)


def soft_class_sums(
    teacher_BC: jax.Array,
    logits_BC: jax.Array,
    label_B: jax.Array,
    weight_B: jax.Array,
    temperature: float,
    hard: float,
    among: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Return (1 - hard) * KL divergence from the teacher + hard * cross-entropy, and the metric sums including "kl"."""
    nll, sums = class_sums(logits_BC, label_B, weight_B, among=among)
    kl = jnp.sum(chunked_loss.divergence(only(teacher_BC, among), only(logits_BC, among), temperature) * weight_B)
    return (1 - hard) * kl + hard * nll, sums | {"kl": kl}


def soft_number_sums(
    teacher_B: jax.Array, y_B: jax.Array, label_B: jax.Array, weight_B: jax.Array, hard: float
) -> tuple[jax.Array, Sums]:
    """Return (1 - hard) * squared error to the teacher + hard * squared error to the labels, and the metric sums."""
    taught, _ = number_sums(y_B, teacher_B, weight_B)
    loss, sums = number_sums(y_B, label_B, weight_B)
    return (1 - hard) * taught + hard * loss, sums
