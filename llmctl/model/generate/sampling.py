"""From logits to the next token: greedy, or drawn from a distribution that rules have narrowed.

The rules apply in this order: repetition penalty, temperature, top-k, top-p, min-p. Each row draws from a key of its
own that depends on the seed, the row's number and the step alone, so a batch draws what its rows would in another.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

EXCLUDED = -jnp.inf


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keeps the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the likeliest tokens that together reach this probability (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keeps tokens at least this fraction as likely as the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that were there before (arXiv:1909.05858)."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError("temperature and top_k must not be negative, top_p in (0, 1] and min_p in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError("repetition_penalty must be positive")


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """The repetition penalty on tokens that are in the prompt or were generated."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def narrow(logits_BV: jax.Array, rules: Sampling) -> jax.Array:
    """Logits with the tokens that top-k, top-p and min-p leave out at -inf. Ties at a limit all stay."""
    if rules.top_k and rules.top_k < logits_BV.shape[-1]:
        limit_B1 = jax.lax.top_k(logits_BV, rules.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < limit_B1, EXCLUDED, logits_BV)
    if rules.top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while those before it have not reached top_p; the first always stays.
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        kept_B1 = jnp.sum(before_BV < rules.top_p, axis=-1, keepdims=True)
        limit_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < limit_B1, EXCLUDED, logits_BV)
    if rules.min_p > 0.0:
        # p >= min_p * max p, in logarithms: no sum over the vocabulary is needed.
        limit_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(rules.min_p)
        logits_BV = jnp.where(logits_BV < limit_B1, EXCLUDED, logits_BV)
    return logits_BV


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, step: jax.Array | int, rules: Sampling
) -> jax.Array:
    """The next token of each row -> int32 [B]. `seen_BV` is read where there is a repetition penalty."""
    if rules.repetition_penalty != 1.0 and seen_BV is not None:
        logits_BV = penalize(logits_BV, seen_BV, rules.repetition_penalty)
    if rules.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = narrow(logits_BV / rules.temperature, rules)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def row_keys(seed: int, rows: int, first: int = 0) -> jax.Array:
    """One key a row, by its number; the first row here has the number `first`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first + jnp.arange(rows))
