"""Define the scalar output of each row that is attributed to the tokens.

- classification: log odds of the target class, log(p / (1 - p))
- multi-label classification: log odds of the target class, which are its logit
- regression: the predicted number
- multiple choice: score of the choice (its log-likelihood, or the output of the head)
- language model: log-likelihood of the continuation, by default of the most likely next token

Log odds do not saturate near probability 1, and they change if another class becomes more likely.

Shapes: B rows, T tokens per row, D model width, C classes, P scored positions per row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.registry import of
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.transformer import Batch, Params

LOG_ODDS, VALUE, SCORE, LOG_LIKELIHOOD = "log odds (nats)", "value", "score", "log-likelihood (nats)"


def check(found: Artifact) -> None:
    """Check that the output of an artifact can be attributed.

    Raises:
        RequestError: If the artifact has one output per token, returns vectors, or only fills masks.
    """
    kind, task = found.model.head_kind, of(found.manifest)
    if kind.vocabulary and found.model.architecture == "encoder":
        raise RequestError(f"{found.path}: only fills masks; explain needs a task head, or a model that generates text")
    if kind.per_token or kind.bare:
        raise RequestError(
            f"{found.path}: {task.title} has no single output per text; explain reads classifiers, regression, "
            "multiple choice and language models"
        )


def unit(found: Artifact) -> str:
    """Return the unit of the output, and so of attributions by gradients."""
    kind = found.model.head_kind
    if kind.vocabulary:
        return LOG_LIKELIHOOD
    return (SCORE if of(found.manifest).name == "choice" else VALUE) if kind.scalar else LOG_ODDS


def outputs(found: Artifact, params: Params, x_BTD: jax.Array, batch: Batch, dtype: Any) -> jax.Array:
    """Return the scalar output of each row, float32 [B].

    Args:
        found: The artifact; only its config and task are used.
        params: Parameters of the model.
        x_BTD: Final hidden states.
        batch: The rows. `target` [B] is the class of each row. A language model needs `at`, `targets` and `weights`
            [B, P]: scored positions, their target tokens, and 0 for positions that only fill a row.
        dtype: Dtype of the computation.
    """
    cfg = found.model
    if cfg.head_kind.vocabulary:
        return log_likelihood(cfg, params, x_BTD, batch, dtype)
    y = functional.outputs(cfg, params, x_BTD, batch, dtype)
    if cfg.head_kind.scalar:
        return y
    target_B1 = batch["target"][:, None]
    chosen_B = jnp.take_along_axis(y, target_B1, axis=1)[:, 0]
    if of(found.manifest).label_type == "set":
        return chosen_B
    others_BC = jnp.where(jnp.arange(y.shape[1]) == target_B1, -jnp.inf, y)
    return chosen_B - jax.nn.logsumexp(others_BC, axis=1)


def log_likelihood(cfg: ModelConfig, params: Params, x_BTD: jax.Array, batch: Batch, dtype: Any) -> jax.Array:
    """Return the log-likelihood in nats of each row's scored tokens, [B]."""
    log_p_BPV = jax.nn.log_softmax(scored_logits(cfg, params, x_BTD, batch, dtype))
    log_p_BP = jnp.take_along_axis(log_p_BPV, batch["targets"][..., None], axis=2)[..., 0]
    return jnp.sum(log_p_BP * batch["weights"], axis=1)


def scored_logits(cfg: ModelConfig, params: Params, x_BTD: jax.Array, batch: Batch, dtype: Any) -> jax.Array:
    """Return the logits at the scored positions, [B, P, V]."""
    x_BPD = jnp.take_along_axis(x_BTD, batch["at"][..., None], axis=1)
    return functional.lm_logits(cfg, params, x_BPD, dtype)
