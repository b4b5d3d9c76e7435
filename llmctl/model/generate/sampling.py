"""Select the next token from logits: the most probable token, or a sample from a truncated distribution.

The rules apply in this order: repetition penalty, temperature, top-k, top-p, min-p. Each row has its own random key,
which depends only on the seed, the row's index and the step. The tokens of a row are therefore the same in every batch.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llmctl.config.base import FLOAT32_MAX

EXCLUDED = -jnp.inf
MIN_TEMPERATURE = 1e-6
"""Smallest allowed temperature above 0. Division by a smaller number can exceed the range of float32."""


@dataclass(frozen=True)
class Sampling:
    """Configure how the next token is selected. By default, the most probable token is selected.

    Example:
        >>> import jax.numpy as jnp
        >>> rules = Sampling(temperature=0.8, top_k=2)
        >>> truncate_logits(jnp.array([[1.0, 3.0, 2.0]]), rules).tolist()
        [[-inf, 3.0, 2.0]]
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 selects the most probable token."""
    top_k: int = 0
    """Number of most probable tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Probability mass to keep. The most probable tokens are kept until their total probability reaches this value
    (Holtzman et al., 2019, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Minimum probability of a kept token, as a fraction of the highest probability (Nguyen et al., 2024,
    arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that already occurred (Keskar et al., 2019, arXiv:1909.05858). Positive logits are divided by
    the penalty, and negative logits are multiplied by the penalty."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError("temperature and top_k must not be negative, top_p in (0, 1] and min_p in [0, 1]")
        if not 0 < self.repetition_penalty <= FLOAT32_MAX:
            raise ValueError("repetition_penalty must be positive and finite in float32")
        if self.temperature and not MIN_TEMPERATURE <= self.temperature <= FLOAT32_MAX:
            raise ValueError(f"temperature must be 0, or at least {MIN_TEMPERATURE:g} and finite in float32")


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Apply the repetition penalty to the logits of tokens for which `seen_BV` is true."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def truncate_logits(logits_BV: jax.Array, rules: Sampling) -> jax.Array:
    """Set the logit of a token to -inf if top-k, top-p or min-p excludes the token.

    Tokens with the same probability as the last kept token are also kept.
    """
    if rules.top_k and rules.top_k < logits_BV.shape[-1]:
        limit_B1 = jax.lax.top_k(logits_BV, rules.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < limit_B1, EXCLUDED, logits_BV)
    if rules.top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token is kept if those before it have not reached top_p, so the first one is always kept.
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        kept_B1 = jnp.sum(before_BV < rules.top_p, axis=-1, keepdims=True)
        limit_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < limit_B1, EXCLUDED, logits_BV)
    if rules.min_p > 0.0:
        # p >= min_p * max p, compared as logarithms, needs no sum over the vocabulary.
        limit_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(rules.min_p)
        logits_BV = jnp.where(logits_BV < limit_B1, EXCLUDED, logits_BV)
    return logits_BV


def adjust_logits(logits_BV: jax.Array, seen_BV: jax.Array | None, rules: Sampling) -> jax.Array:
    """Apply the repetition penalty and, if tokens are sampled, the temperature and the truncation to logits.

    The softmax of the result is the distribution from which `choose` samples. If tokens are not sampled, the token with
    the largest logit of the result is selected.

    Args:
        logits_BV: Logits.
        seen_BV: Whether each token occurred before; used only with a repetition penalty.
        rules: Sampling rules.
    """
    if rules.repetition_penalty != 1.0 and seen_BV is not None:
        logits_BV = penalize(logits_BV, seen_BV, rules.repetition_penalty)
    return truncate_logits(logits_BV / rules.temperature, rules) if rules.temperature else logits_BV


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, step: jax.Array | int, rules: Sampling
) -> jax.Array:
    """Select the next token of each row.

    Args:
        logits_BV: Logits.
        seen_BV: Whether each token occurred before; used only with a repetition penalty.
        keys_B: One random key per row.
        step: Index of the step, folded into the keys.
        rules: Sampling rules.

    Returns:
        Token ids int32 [B].
    """
    logits_BV = adjust_logits(logits_BV, seen_BV, rules)
    if rules.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def row_keys(seed: int, rows: int, first: int = 0) -> jax.Array:
    """Return one random key per row, derived from the seed and the index of the row; the first index is `first`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first + jnp.arange(rows))
