"""What a model is trained on and judged by: (params, batch) -> (sum of losses, sums by metric name, and "weight").

A metric is its sum divided by the sum of "weight" (`losses.means`); so means over batches, microbatches
and devices are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmctl import losses
from llmctl.model import ModelConfig, calls
from llmctl.model.transformer import Batch

Sums = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Sums]]
"""loss(params, batch, key=None): with a dropout key it is a training loss, without one an evaluation."""


def loss_of(
    cfg: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Loss:
    """The loss of the config's head: next-token (or masked-token) cross-entropy, classification, regression.

    `label_smoothing` and `z_loss` (see `losses.cross_entropy`) change what is minimized, not the metrics.
    """
    answer = {"lm": _lm, "classify": _classify, "regress": _regress}.get(cfg.head)
    if answer is None:
        raise ValueError(f"no loss for head {cfg.head!r}")

    def loss(params: dict[str, Any], batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
        x_BTD = calls.hidden(cfg, params, batch, train=key is not None, rng=key, dtype=dtype, remat=remat)
        return answer(cfg, params, x_BTD, batch, dtype, label_smoothing, z_loss)

    return loss


def project(cfg: ModelConfig, dtype: Any) -> losses.Project:
    """(`calls.head_params`, hidden states) -> logits, for the chunked losses."""
    return lambda head, x: calls.head_logits(cfg, head, x, dtype)


def _lm(
    cfg: ModelConfig, params: dict[str, Any], x_BTD: jax.Array, batch: Batch, dtype: Any, smoothing: float, z: float
) -> tuple[jax.Array, Sums]:
    head = calls.head_params(cfg, params)
    x_BPD, targets_BP, weights_BP = predicted(batch, x_BTD)
    total, sums = losses.cross_entropy(
        project(cfg, dtype), head, x_BPD, targets_BP, weights_BP, cfg.vocab_size, smoothing, z
    )
    found = {"loss": sums["nll"], "accuracy": sums["correct"], "weight": sums["weight"]}
    if not (cfg.next_sentence and "next_label" in batch):
        return total, found
    logits_B2 = calls.outputs(cfg, params, x_BTD, batch, dtype)
    label_B = batch["next_label"]
    follows, sums = class_sums(logits_B2, label_B, row_weight(batch, label_B) * (label_B >= 0), smoothing, z)
    # The step divides by the number of masked tokens: a pair counts as much as the masked tokens of a whole row.
    return total + targets_BP.shape[1] * follows, found | {f"next_sentence_{k}": v for k, v in sums.items()}


def predicted(batch: Batch, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(hidden states, targets, weights) where something is predicted.

    Rows with `places` [B, P] predict there alone: the output projection, which for a small encoder costs more than all
    its layers, then runs over P instead of T tokens a row.
    """
    targets_BT, weights_BT = batch["targets"], batch["weights"]
    if "places" not in batch:
        return x_BTD, targets_BT, weights_BT
    at_BP = batch["places"]
    x_BPD = jnp.take_along_axis(x_BTD, at_BP[..., None], axis=1)
    return x_BPD, jnp.take_along_axis(targets_BT, at_BP, axis=1), jnp.take_along_axis(weights_BT, at_BP, axis=1)


def _classify(
    cfg: ModelConfig, params: dict[str, Any], x_BTD: jax.Array, batch: Batch, dtype: Any, smoothing: float, z: float
) -> tuple[jax.Array, Sums]:
    logits_BC = calls.outputs(cfg, params, x_BTD, batch, dtype)
    return class_sums(logits_BC, batch["label"], row_weight(batch, batch["label"]), smoothing, z)


def _regress(
    cfg: ModelConfig, params: dict[str, Any], x_BTD: jax.Array, batch: Batch, dtype: Any, smoothing: float, z: float
) -> tuple[jax.Array, Sums]:
    y_B = calls.outputs(cfg, params, x_BTD, batch, dtype)
    return number_sums(y_B, batch["label"], row_weight(batch, batch["label"]))


def number_sums(y_B: jax.Array, label_B: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, Sums]:
    """Squared error; the metrics are its sum and that of the absolute "error"."""
    off_B = y_B - label_B
    loss = jnp.sum(jnp.square(off_B) * weight_B)
    return loss, {"loss": loss, "error": jnp.sum(jnp.abs(off_B) * weight_B), "weight": jnp.sum(weight_B)}


def row_weight(batch: Batch, label_B: jax.Array) -> jax.Array:
    """[B]: 1 for an example, 0 for a row that only fills the batch."""
    return batch["row_weight"] if "row_weight" in batch else jnp.ones(label_B.shape, jnp.float32)


def class_sums(
    logits_BC: jax.Array, label_B: jax.Array, weight_B: jax.Array, smoothing: float = 0.0, z: float = 0.0
) -> tuple[jax.Array, Sums]:
    """Cross-entropy (nats) of class logits; smoothing and z-loss are part of the first result alone."""
    log_p, partition_B = losses.target_log_probability(logits_BC, label_B)
    nll_B = -log_p
    loss_B = (1 - smoothing) * nll_B + smoothing * (partition_B - jnp.mean(logits_BC, axis=-1))
    loss_B = loss_B + z * jnp.square(partition_B)
    hit_B = jnp.argmax(logits_BC, axis=-1) == label_B
    sums = {"loss": jnp.sum(nll_B * weight_B), "accuracy": jnp.sum(hit_B * weight_B), "weight": jnp.sum(weight_B)}
    return jnp.sum(loss_B * weight_B), sums


def soft_class_sums(
    teacher_BC: jax.Array,
    logits_BC: jax.Array,
    label_B: jax.Array,
    weight_B: jax.Array,
    temperature: float,
    hard: float,
) -> tuple[jax.Array, Sums]:
    """(1 - hard) * softened KL to the teacher's logits + hard * cross-entropy; the sums also hold "kl"."""
    nll, sums = class_sums(logits_BC, label_B, weight_B)
    kl = jnp.sum(losses.divergence(teacher_BC, logits_BC, temperature) * weight_B)
    return (1 - hard) * kl + hard * nll, sums | {"kl": kl}
