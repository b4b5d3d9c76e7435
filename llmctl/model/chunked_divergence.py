"""Compute divergences between two token distributions in chunks, so that logits [B, T, V] are never stored.

`distillation` compares a student with a teacher. `listed_distillation` compares a student with stored probabilities of
a teacher. `symmetric_divergence` compares two forward passes of one model.

Shapes: B batch, T sequence, D model width, E = 2 * D, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from llmctl.model.chunked_loss import (
    Project,
    Tree,
    chunk_logits,
    chunked,
    hits,
    per_token,
    target_log_probability,
)
from llmctl.model.divergences import Divergence, Listed, SoftLoss, mean_logits

Side = tuple[Project, Tree, jax.Array]
"""One of the compared models: (output projection, parameters of the projection, hidden states [B, T, width])."""


def symmetric_divergence(
    project: Project,
    heads: tuple[Tree, Tree],
    x_BTD: jax.Array,
    other_BTD: jax.Array,
    weights_BT: jax.Array,
    vocab: int,
) -> jax.Array:
    """Compute the symmetric divergence (KL(p || q) + KL(q || p)) / 2 of two output distributions p and q, in nats.

    The result is the weighted sum over tokens. This sum is differentiable with respect to `x_BTD` and `other_BTD`.

    Args:
        project: Output projection.
        heads: Two parameter trees of the output projection, the first for `x_BTD` and the second for `other_BTD`.
        x_BTD: Hidden states from which p is computed.
        other_BTD: Hidden states from which q is computed.
        weights_BT: Weights of the tokens.
        vocab: Size of the vocabulary.
    """
    width, kl = x_BTD.shape[-1], Divergence().between

    def fn(heads: Tree, _: Tree, both: jax.Array, weights: jax.Array) -> tuple[jax.Array, Tree]:
        p = chunk_logits(project, heads["one"], both[..., :width])
        q = chunk_logits(project, heads["other"], both[..., width:])
        return jnp.sum((kl(p, q) + kl(q, p)) / 2 * weights), {}

    both_BTE = jnp.concatenate([x_BTD, other_BTD], axis=-1)  # `chunked` differentiates one array of hidden states
    found: tuple[jax.Array, Tree] = chunked(fn, vocab, {"one": heads[0], "other": heads[1]}, (), both_BTE, weights_BT)
    return found[0]


def distillation(
    student: Side, teachers: Sequence[Side], targets_BT: jax.Array, weights_BT: jax.Array, vocab: int, how: SoftLoss
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the distillation loss of token predictions, as a weighted sum over tokens.

    The loss of a token is `how.soft` * divergence + `how.hard` * cross-entropy. If there are several teachers, their
    probabilities are averaged. The result is differentiable with respect to the student's arrays.

    Args:
        student: Output projection and hidden states of the student.
        teachers: Output projection and hidden states of each teacher.
        targets_BT: Target tokens.
        weights_BT: Weights of the targets.
        vocab: Size of the vocabulary.
        how: Divergence and weights.

    Returns:
        The loss, and the sums "nll", "correct", "weight", and the sum of the divergence (named by `Divergence.metric`).
    """
    project, head, x_BTD = student
    projects, heads, taught = zip(*teachers, strict=True)
    measure = how.divergence

    mix = _weights_per_token(how, weights_BT)

    def fn(head: Tree, heads: Tree, x: jax.Array, aligned: Tree) -> tuple[jax.Array, Tree]:
        taught, targets, weights, mix = aligned
        logits = chunk_logits(project, head, x)
        given = [chunk_logits(*side) for side in zip(projects, heads, taught, strict=True)]
        apart = measure.between(mean_logits(given, measure.temperature), logits)
        return _token_sums(logits, apart, targets, weights, replace(how, **mix))

    return chunked(fn, vocab, head, heads, x_BTD, (taught, targets_BT, weights_BT, mix))


def listed_tokens(teachers: Sequence[Side], vocab: int, k: int, temperature: float) -> Listed:
    """Return the k most probable tokens at every position, [B, T, k], from the mean probabilities of the teachers.

    Args:
        teachers: Output projection and hidden states of each teacher.
        vocab: Size of the vocabulary.
        k: Number of tokens that are listed.
        temperature: Divisor of the logits.
    """
    projects, heads, (x_BTD, *others) = zip(*teachers, strict=True)

    def best(heads: Tree, x: jax.Array, others: Tree) -> Listed:
        each = [chunk_logits(*side) for side in zip(projects, heads.values(), (x, *others), strict=True)]
        return Listed.of(mean_logits(each, temperature), k, temperature)

    # Trees of parameters are dictionaries: a tuple would be taken for one weight.
    named = {f"{i:03}": head for i, head in enumerate(heads)}
    return per_token(best, named, x_BTD, tuple(others), vocab)


def listed_distillation(
    student: Side, teacher: Listed, targets_BT: jax.Array, weights_BT: jax.Array, vocab: int, how: SoftLoss
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the distillation loss of token predictions from the teacher's listed tokens (see `distillation`).

    Args:
        student: Output projection and hidden states of the student.
        teacher: Most probable tokens of the teacher at every position.
        targets_BT: Target tokens.
        weights_BT: Weights of the targets.
        vocab: Size of the vocabulary.
        how: Divergence and weights.
    """
    project, head, x_BTD = student
    mix = _weights_per_token(how, weights_BT)

    def fn(head: Tree, _: Tree, x: jax.Array, aligned: Tree) -> tuple[jax.Array, Tree]:
        listed, targets, weights, mix = aligned
        logits = chunk_logits(project, head, x)
        apart = how.divergence.from_listed(listed, logits)
        return _token_sums(logits, apart, targets, weights, replace(how, **mix))

    return chunked(fn, vocab, head, (), x_BTD, (teacher, targets_BT, weights_BT, mix))


def _weights_per_token(how: SoftLoss, weights_BT: jax.Array) -> dict[str, jax.Array]:
    """Return {"soft" or "hard": weight of each token [B, T]} for the weights in `how` that are arrays.

    Weights that are numbers are omitted.
    """
    values = {"soft": how.soft, "hard": how.hard}
    return {
        name: jnp.broadcast_to(value, weights_BT.shape)
        for name, value in values.items()
        if isinstance(value, jax.Array)
    }


def _token_sums(
    logits: jax.Array, divergence: jax.Array, targets: jax.Array, weights: jax.Array, how: SoftLoss
) -> tuple[jax.Array, Tree]:
    """Return the distillation loss of a chunk, and the sums for metrics.

    The arguments are the student's logits, and arrays with one value per token, such as the divergence.
    """
    nll = -target_log_probability(logits, targets)[0]
    correct = hits(logits, targets) * weights
    sums = {"nll": nll * weights, how.divergence.metric: divergence * weights, "correct": correct, "weight": weights}
    return jnp.sum(how.combined(divergence, nll) * weights), jax.tree.map(jnp.sum, sums)
