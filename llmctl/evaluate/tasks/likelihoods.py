"""Compute losses on the log-likelihoods of complete rows, such as several completions of one prompt.

Shapes: B examples, K rows per example, R = B * K rows, T tokens per row, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.distributed import mesh as meshes
from llmctl.evaluate.setup import Batch
from llmctl.evaluate.tasks.losses import predicted, project
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig
from llmctl.model.losses import Sums


def interleaved(batch: Batch, prefixes: Sequence[str]) -> Batch:
    """Interleave arrays of a batch whose names differ only in the prefix: K arrays [B, T] become one array [B * K, T].

    With the prefixes "" and "rejected_", for example, `tokens` and `rejected_tokens` become `tokens`. The K rows of
    each example follow one another. Arrays that exist only without prefix are returned unchanged.
    """
    last = prefixes[-1]
    names = [name.removeprefix(last) for name in batch if name.startswith(last)]

    def rows(name: str) -> jax.Array:
        stacked = jnp.stack([batch[prefix + name] for prefix in prefixes], axis=1)
        return meshes.constrain(stacked.reshape(-1, stacked.shape[-1]), "batch", "seq")

    others = tuple(prefix for prefix in prefixes if prefix)
    return {k: a for k, a in batch.items() if not k.startswith(others)} | {name: rows(name) for name in names}


def log_likelihood(
    cfg: ModelConfig, params: functional.Params, x_RTD: jax.Array, batch: Batch, dtype: Any
) -> jax.Array:
    """Return the log-likelihood of each row in nats, [R].

    It is the sum of the log probabilities of the row's targets, each multiplied by its weight in `weights`.

    Logits are computed in chunks.
    """
    x_RPD, targets_RP, weights_RP = predicted(batch, x_RTD)
    head = functional.head_params(cfg, params)
    nll_RP = chunked_loss.token_nll(project(cfg, dtype), head, x_RPD, targets_RP, cfg.vocab_size)
    return -jnp.sum(jnp.where(weights_RP > 0, nll_RP * weights_RP, 0.0), axis=-1)


def loss_of_rows(
    cfg: ModelConfig,
    params: functional.Params,
    x_RTD: jax.Array,
    batch: Batch,
    dtype: Any,
    compute: Callable[[jax.Array], tuple[jax.Array, Sums]],
) -> tuple[jax.Array, Sums]:
    """Return (loss, metrics summed over the batch), which `compute` computes from the log-likelihoods [R] of the rows.

    The gradient is computed as the gradient of a weighted cross-entropy. All tokens of a row have the same weight:
    minus the derivative of the loss with respect to the row's log-likelihood. Logits can therefore be computed in
    chunks, as in other losses. The cost is one more output projection.

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        x_RTD: Hidden states.
        batch: Rows with `targets` and `weights` [R, T].
        dtype: Dtype of the computation.
        compute: Function from log-likelihoods [R] to (loss, summed metrics).
    """
    found_R = log_likelihood(cfg, *jax.lax.stop_gradient((params, x_RTD)), batch, dtype)
    (total, sums), slope_R = jax.value_and_grad(compute, has_aux=True)(found_R)
    x_RPD, targets_RP, weights_RP = predicted(batch, x_RTD)
    weighed, _ = chunked_loss.cross_entropy(
        project(cfg, dtype), functional.head_params(cfg, params), x_RPD, targets_RP, -slope_R[:, None] * weights_RP,
        cfg.vocab_size,
    )  # fmt: skip
    return total + weighed - jax.lax.stop_gradient(weighed), sums
