"""What a model is trained on and judged by: (params, batch) -> (sum of losses, sums by metric name, and "weight").

A metric is its sum divided by the sum of "weight" (`losses.means`); so means over batches, microbatches
and devices are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.distributed import mesh as meshes
from llmctl.model import chunked_loss, entity_counts, functional
from llmctl.model.config import ModelConfig
from llmctl.model.transformer import Batch

Sums = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Sums]]
"""loss(params, batch, key=None): with a dropout key it is a training loss, without one an evaluation."""


IMPOSSIBLE = -1e30
"""A logit of what cannot be; finite, so that no difference of two is undefined."""
NEARNESS = 0.05
"""What divides cosine similarities, so that a softmax over them can become sharp."""


def loss_of(
    cfg: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = NEARNESS,
    marks: np.ndarray | None = None,
) -> Loss:
    """The loss of the config's head: cross-entropy of tokens, classes, tags or places, squared error, contrast.

    `label_smoothing` and `z_loss` (see `losses.cross_entropy`) change what is minimized, not the metrics; `temperature`
    divides the similarities of embeddings. Where `marks` says what labels of words mark (`entities.sums`), their F1 is
    a metric too.
    """
    heads = {"lm": _lm, "classify": _classify, "regress": _regress, "tokens": partial(_tokens, marks), "span": _span}
    answer = heads | {"embed": partial(_embed, temperature)}

    def loss(params: dict[str, Any], batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
        batch = reads(batch)
        x_BTD = functional.hidden(cfg, params, batch, train=key is not None, rng=key, dtype=dtype, remat=remat)
        return answer[cfg.head](cfg, params, x_BTD, batch, dtype, label_smoothing, z_loss)

    return loss


def project(cfg: ModelConfig, dtype: Any) -> chunked_loss.Project:
    """(`calls.head_params`, hidden states) -> logits, for the chunked losses."""
    return lambda head, x: functional.head_logits(cfg, head, x, dtype)


def _lm(
    cfg: ModelConfig, params: dict[str, Any], x_BTD: jax.Array, batch: Batch, dtype: Any, smoothing: float, z: float
) -> tuple[jax.Array, Sums]:
    head = functional.head_params(cfg, params)
    x_BPD, targets_BP, weights_BP = predicted(batch, x_BTD)
    total, sums = chunked_loss.cross_entropy(
        project(cfg, dtype), head, x_BPD, targets_BP, weights_BP, cfg.vocab_size, smoothing, z
    )
    found = {"loss": sums["nll"], "accuracy": sums["correct"], "weight": sums["weight"]}
    if not (cfg.next_sentence and "next_label" in batch):
        return total, found
    logits_B2 = functional.outputs(cfg, params, x_BTD, batch, dtype)
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
    logits_BC = functional.outputs(cfg, params, x_BTD, batch, dtype)
    return class_sums(logits_BC, batch["label"], row_weight(batch, batch["label"]), smoothing, z)


def _regress(
    cfg: ModelConfig, params: dict[str, Any], x_BTD: jax.Array, batch: Batch, dtype: Any, smoothing: float, z: float
) -> tuple[jax.Array, Sums]:
    y_B = functional.outputs(cfg, params, x_BTD, batch, dtype)
    return number_sums(y_B, batch["label"], row_weight(batch, batch["label"]))


def _tokens(
    marks: np.ndarray | None,
    cfg: ModelConfig,
    params: dict[str, Any],
    x_BTD: jax.Array,
    batch: Batch,
    dtype: Any,
    smoothing: float,
    z: float,
) -> tuple[jax.Array, Sums]:
    logits_BTC = functional.outputs(cfg, params, x_BTD, batch, dtype)
    loss, sums = class_sums(logits_BTC, batch["targets"], batch["weights"], smoothing, z)
    if marks is not None:
        sums |= entity_counts.sums(marks, batch["targets"], logits_BTC.argmax(-1), batch["weights"], batch.get("order"))
    return loss, sums


def _span(
    cfg: ModelConfig, params: dict[str, Any], x_BTD: jax.Array, batch: Batch, dtype: Any, smoothing: float, z: float
) -> tuple[jax.Array, Sums]:
    logits_BT2 = functional.outputs(cfg, params, x_BTD, batch, dtype)
    among = batch["among"]
    return place_sums(lambda k, at, weight: class_sums(logits_BT2[..., k], at, weight, smoothing, z, among), batch)


def place_sums(one: Callable[..., tuple[jax.Array, Sums]], batch: Batch) -> tuple[jax.Array, Sums]:
    """The mean of `one`(0, start, weight) and `one`(1, end, weight): a span is right as far as its two places are."""
    weight_B = row_weight(batch, batch["start"])
    first, last = (one(k, batch[name], weight_B) for k, name in enumerate(("start", "end")))
    return jax.tree.map(lambda a, b: (a + b) / 2, first, last)


def reads(batch: Batch) -> Batch:
    """The batch as the network reads it: of two texts a row [B, T] each, one row after the other [2B, T]."""
    if "pair_tokens" not in batch:
        return batch

    def woven(name: str) -> jax.Array:
        both = jnp.stack([batch[name], batch.get(f"pair_{name}", batch[name])], axis=1)
        return meshes.constrain(both.reshape(-1, both.shape[-1]), "batch", "seq")

    return batch | {name: woven(name) for name in ("tokens", "segments", "positions", "order") if name in batch}


def _embed(
    temperature: float,
    cfg: ModelConfig,
    params: dict[str, Any],
    x_BTD: jax.Array,
    batch: Batch,
    dtype: Any,
    smoothing: float,
    z: float,
) -> tuple[jax.Array, Sums]:
    near = nearness(functional.outputs(cfg, params, x_BTD, batch, dtype), batch)
    weight_B = row_weight(batch, near)
    if "label" in batch:
        return number_sums(near, batch["label"], weight_B)
    return class_sums(near / temperature, jnp.arange(len(near)), weight_B, smoothing, z, weight_B)


def nearness(z_ND: jax.Array, batch: Batch) -> jax.Array:
    """Cosine similarities [B, B] from unit vectors of texts and pairs in turn, N = 2B: every text to every pair.

    Those are the pairs of the whole batch, on all devices: a row's own must stand out among those of the others
    (arXiv:1807.03748, arXiv:1705.00652). Where rows have scores: of the two of each row, [B].
    """
    # not z_ND[::2]: XLA's partitioner makes wrong programs of the gradient of such a slice
    text_BD, pair_BD = (z_ND.reshape(-1, 2, z_ND.shape[-1])[:, k] for k in (0, 1))
    if "label" in batch:
        return jnp.sum(text_BD * pair_BD, axis=-1)
    pair_BD = meshes.constrain(pair_BD, None, None)
    return jnp.matmul(text_BD, pair_BD.T, precision="highest")


def number_sums(y_B: jax.Array, label_B: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, Sums]:
    """Squared error; the metrics are its sum and that of the absolute "error"."""
    off_B = y_B - label_B
    loss = jnp.sum(jnp.square(off_B) * weight_B)
    return loss, {"loss": loss, "error": jnp.sum(jnp.abs(off_B) * weight_B), "weight": jnp.sum(weight_B)}


def row_weight(batch: Batch, label_B: jax.Array) -> jax.Array:
    """[B]: 1 for an example, 0 for a row that only fills the batch; `label_B` is any array of the batch's rows."""
    return batch["row_weight"] if "row_weight" in batch else jnp.ones(label_B.shape[:1], jnp.float32)


def class_sums(
    logits_BC: jax.Array,
    label_B: jax.Array,
    weight_B: jax.Array,
    smoothing: float = 0.0,
    z: float = 0.0,
    among: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy (nats) of class logits; smoothing and z-loss are part of the first result alone.

    There may be other axes between B and C, and `among` (nonzero where a class may be, for logits [B, C]).
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
    """The logits, of what is not `among` (0 there) beyond reach."""
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
    """(1 - hard) * softened KL to the teacher's logits + hard * cross-entropy; the sums also hold "kl"."""
    nll, sums = class_sums(logits_BC, label_B, weight_B, among=among)
    kl = jnp.sum(chunked_loss.divergence(only(teacher_BC, among), only(logits_BC, among), temperature) * weight_B)
    return (1 - hard) * kl + hard * nll, sums | {"kl": kl}


def soft_sums(
    head: str, teacher: jax.Array, y: jax.Array, batch: Batch, temperature: float, hard: float
) -> tuple[jax.Array, Sums]:
    """The mixed loss of a task head's answer `y` (`calls.outputs`), given the teacher's; embeddings by their nearness.

    Classes, tags and places as `soft_class_sums`; numbers are taught by squared error.
    """
    if head == "tokens":
        return soft_class_sums(teacher, y, batch["targets"], batch["weights"], temperature, hard)
    if head == "span":

        def one(k: int, at: jax.Array, weight: jax.Array) -> tuple[jax.Array, Sums]:
            return soft_class_sums(teacher[..., k], y[..., k], at, weight, temperature, hard, batch["among"])

        return place_sums(one, batch)
    if head == "embed":
        teacher, y = nearness(teacher, batch), nearness(y, batch)
    weight_B = row_weight(batch, y)
    if head == "classify":
        return soft_class_sums(teacher, y, batch["label"], weight_B, temperature, hard)
    if head == "embed" and "label" not in batch:
        own = jnp.arange(len(y))
        return soft_class_sums(teacher / NEARNESS, y / NEARNESS, own, weight_B, temperature, hard, weight_B)
    taught, _ = number_sums(y, teacher, weight_B)
    loss, sums = number_sums(y, batch["label"], weight_B)
    return (1 - hard) * taught + hard * loss, sums
