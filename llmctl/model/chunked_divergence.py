"""Compute divergences between two token distributions in chunks, so that logits [B, T, V] are never stored.

`distillation` compares a student with a teacher. `symmetric_divergence` compares two forward passes of one model.

Shapes: B batch, T sequence, D model width, E model width of a teacher, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmctl.model.chunked_loss import Project, Tree, chunk_logits, chunked, hits, target_log_probability


def divergence(teacher_V: jax.Array, student_V: jax.Array, temperature: float) -> jax.Array:
    """Return the KL divergence KL(teacher || student) in nats, [...], from logits [..., V].

    Both distributions are softmax outputs at `temperature`. The divergence is multiplied by the square of the
    temperature (Hinton et al., 2015, arXiv:1503.02531).
    """
    log_t = jax.nn.log_softmax(teacher_V / temperature, axis=-1)
    log_s = jax.nn.log_softmax(student_V / temperature, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def symmetric_divergence(
    project: Project,
    heads: tuple[Tree, Tree],
    x_BTD: jax.Array,
    other_BTD: jax.Array,
    weights_BT: jax.Array,
    vocab: int,
) -> jax.Array:
    """Compute the symmetric divergence (KL(p || q) + KL(q || p)) / 2 of two output distributions p and q, in nats.

    The result is the weighted sum over tokens. It is differentiable with respect to the hidden states of both.

    Args:
        project: Output projection.
        heads: Parameters of the output projection for `x_BTD`, and for `other_BTD`.
        x_BTD: Hidden states from which p is computed.
        other_BTD: Hidden states from which q is computed.
        weights_BT: Weights of the tokens.
        vocab: Size of the vocabulary.
    """
    width = x_BTD.shape[-1]

    def fn(heads: Tree, _: Tree, both: jax.Array, weights: jax.Array) -> tuple[jax.Array, Tree]:
        p = chunk_logits(project, heads["one"], both[..., :width])
        q = chunk_logits(project, heads["other"], both[..., width:])
        return jnp.sum((divergence(p, q, 1.0) + divergence(q, p, 1.0)) / 2 * weights), {}

    both_BTE = jnp.concatenate([x_BTD, other_BTD], axis=-1)  # `chunked` differentiates one array of hidden states
    found: tuple[jax.Array, Tree] = chunked(fn, vocab, {"one": heads[0], "other": heads[1]}, (), both_BTE, weights_BT)
    return found[0]


def distillation(
    project: Project,
    head: Tree,
    x_BTD: jax.Array,
    teacher_project: Project,
    teacher_head: Tree,
    teacher_x_BTE: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab: int,
    temperature: float,
    hard: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the distillation loss: (1 - hard) * KL divergence from the teacher + hard * cross-entropy.

    `divergence` defines the KL divergence. Arguments whose names begin with `teacher_` belong to the teacher. The
    others belong to the student, and are described by `cross_entropy`.

    Returns:
        The loss, and the sums {"nll", "kl", "correct", "weight"}.
    """

    def fn(head: Tree, teacher_head: Tree, x: jax.Array, aligned: Tree) -> tuple[jax.Array, Tree]:
        teacher_x, targets, weights = aligned
        logits = chunk_logits(project, head, x)
        kl = divergence(chunk_logits(teacher_project, teacher_head, teacher_x), logits, temperature)
        nll = -target_log_probability(logits, targets)[0]
        correct = hits(logits, targets) * weights
        sums = {"nll": nll * weights, "kl": kl * weights, "correct": correct, "weight": weights}
        return jnp.sum(((1 - hard) * kl + hard * nll) * weights), jax.tree.map(jnp.sum, sums)

    return chunked(fn, vocab, head, teacher_head, x_BTD, (teacher_x_BTE, targets_BT, weights_BT))
