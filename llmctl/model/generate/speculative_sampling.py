"""Decide which of a draft model's proposed tokens a target model accepts (Leviathan et al., 2023, arXiv:2211.17192).

Greedy decoding accepts proposed tokens until a proposed token is not the target's most probable token. Let p be the
target's distribution, and q the draft's distribution. Sampling accepts a token d with probability min(1, p(d) / q(d)).
After a rejection, the next token is sampled from the positive part of p - q, normalized. The accepted and the sampled
tokens then have the distribution p.

Shapes: B rows, N proposed tokens, M = N + 1 target distributions, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def verify_greedy(proposed_BN: jax.Array, target_BMV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Accept the proposed tokens that greedy decoding of the target would select.

    Args:
        proposed_BN: Proposed tokens.
        target_BMV: Logits of the target. The logits at index i predict the proposed token at index i.

    Returns:
        The number of accepted tokens per row, and the target's token after the accepted tokens, int32 [B] each.

    Example:
        >>> target = jnp.log(jnp.array([[[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]]))
        >>> [a.tolist() for a in verify_greedy(jnp.array([[1, 1]]), target)]
        [[1], [0]]
    """
    best_BM = jnp.argmax(target_BMV, axis=-1).astype(jnp.int32)
    accepted_B = _leading(proposed_BN == best_BM[:, :-1])
    return accepted_B, jnp.take_along_axis(best_BM, accepted_B[:, None], axis=1)[:, 0]


def verify_sampled(
    proposed_BN: jax.Array, draft_BNV: jax.Array, target_BMV: jax.Array, accept_B: jax.Array, sample_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accept or reject proposed tokens at random, so that the result has the target's distribution.

    Args:
        proposed_BN: Proposed tokens, sampled from the draft's distributions.
        draft_BNV: Logits of the draft's distributions.
        target_BMV: Logits of the target's distributions.
        accept_B: Random keys of the decisions, one per row.
        sample_B: Random keys of the token after the accepted tokens, one per row.

    Returns:
        The number of accepted tokens per row, and the token after the accepted tokens, int32 [B] each.
    """
    q_BNV, p_BMV = jax.nn.softmax(draft_BNV, axis=-1), jax.nn.softmax(target_BMV, axis=-1)
    q_BN, p_BN = (jnp.take_along_axis(a, proposed_BN[..., None], axis=-1)[..., 0] for a in (q_BNV, p_BMV[:, :-1]))
    u_BN = jax.vmap(lambda key: jax.random.uniform(key, proposed_BN.shape[1:]))(accept_B)
    accepted_B = _leading(u_BN * q_BN < p_BN)
    at_B11 = accepted_B[:, None, None]
    p_BV = jnp.take_along_axis(p_BMV, at_B11, axis=1)[:, 0]
    # The draft has no distribution after its last token: the next token is then sampled from p itself.
    q_BV = jnp.take_along_axis(jnp.pad(q_BNV, ((0, 0), (0, 1), (0, 0))), at_B11, axis=1)[:, 0]
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # If p and q are equal up to rounding, a rejection may leave nothing.
    rest_BV = jnp.where(jnp.any(rest_BV > 0, axis=-1, keepdims=True), rest_BV, p_BV)
    return accepted_B, jax.vmap(jax.random.categorical)(sample_B, jnp.log(rest_BV)).astype(jnp.int32)


def seen_before(seen_BV: jax.Array, proposed_BN: jax.Array) -> jax.Array:
    """Return whether each token of the vocabulary occurred before each of the M = N + 1 predicted tokens, [B, M, V]."""
    named_BNV = proposed_BN[..., None] == jnp.arange(seen_BV.shape[-1])
    added_BNV = jnp.cumsum(named_BNV, axis=1) > 0
    return seen_BV[:, None] | jnp.pad(added_BNV, ((0, 0), (1, 0), (0, 0)))


def resized(logits_BV: jax.Array, vocab: int) -> jax.Array:
    """Return the draft's logits for a vocabulary of another size.

    Only tokens that pad the embedding table may be added or omitted.
    """
    less = vocab - logits_BV.shape[-1]
    return jnp.pad(logits_BV, ((0, 0), (0, max(0, less))), constant_values=-jnp.inf)[:, :vocab]


def _leading(true_BN: jax.Array) -> jax.Array:
    """Return the number of true elements before the first false element of each row, int32 [B]."""
    return jnp.sum(jnp.cumprod(true_BN.astype(jnp.int32), axis=1), axis=1)
