"""Compute divergences between the output distributions of a teacher and a student, from their logits.

    how = SoftLoss(Divergence("js", temperature=2.0, beta=0.3), soft=0.9, hard=0.1)
    nats = how.divergence.between(teacher_V, student_V)

Shapes: V vocabulary or classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from llmctl.distributed import mesh as meshes

EXCLUDED_LOGIT = -1e30
"""Logit of an excluded class. The logit is finite, so that the difference of two excluded classes' logits is
defined."""

Kind = Literal["forward", "reverse", "js", "skew", "total_variation"]


@dataclass(frozen=True)
class Divergence:
    """Define a divergence of a student's distribution q from a teacher's distribution p.

    >>> float(Divergence("reverse").between(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.5]))))
    0.0
    """

    kind: Kind = "forward"
    """Kind of divergence. forward: KL(p || q). reverse: KL(q || p). js: beta * KL(p || m) + (1 - beta) * KL(q || m),
    with m = beta * p + (1 - beta) * q (Agarwal et al., 2023, arXiv:2306.13649). skew: KL(p || skew * p + (1 - skew) *
    q) (Ko et al., 2024, arXiv:2402.03898). total_variation: sum of |p - q| / 2. In speculative decoding, 1 -
    total_variation is the probability that the target p accepts a token of the draft q (Zhou et al., 2023,
    arXiv:2310.08461)."""
    temperature: float = 1.0
    """Divisor of the logits. The divergence is multiplied by the square of the temperature (Hinton et al., 2015,
    arXiv:1503.02531). `total_variation` is not multiplied, so that its values are probabilities."""
    beta: float = 0.5
    """Weight of the teacher's distribution in `js`."""
    skew: float = 0.1
    """Weight of the teacher's p in the mixture skew * p + (1 - skew) * q, if the kind is "skew"."""
    top_k: int = 0
    """Number of the teacher's most probable classes that are compared one by one. The probabilities of all other
    classes are added, and compared as one class. 0 compares all classes one by one."""

    @property
    def metric(self) -> str:
        """Return the name of the training metric: "kl" for a KL divergence from p to q, else "divergence"."""
        return "kl" if self.kind == "forward" else "divergence"

    @property
    def _factor(self) -> float:
        return 1.0 if self.kind == "total_variation" else self.temperature**2

    def between(self, teacher_V: jax.Array, student_V: jax.Array) -> jax.Array:
        """Return the divergence in nats, [...], from logits [..., V]."""
        log_p, log_q = (jax.nn.log_softmax(z / self.temperature, axis=-1) for z in (teacher_V, student_V))
        if not self.top_k or self.top_k >= teacher_V.shape[-1]:
            return self._factor * jnp.sum(self._terms(log_p, log_q), axis=-1)
        top = top_classes(teacher_V, self.top_k)
        # Arrays keep their shape [..., V], so a vocabulary that is sharded over devices stays sharded.
        listed = jnp.sum(jnp.where(top, self._terms(log_p, log_q), 0.0), axis=-1)
        rest = (jax.nn.logsumexp(jnp.where(top, EXCLUDED_LOGIT, a), axis=-1) for a in (log_p, log_q))
        return self._factor * (listed + self._terms(*rest))

    def from_listed(self, teacher: Listed, student_V: jax.Array) -> jax.Array:
        """Return the divergence in nats, [...], from a teacher's listed classes and the student's logits [..., V].

        The classes that are not listed are compared by the sum of their probabilities, as with `top_k`. The teacher's
        probabilities must have been computed at `temperature`.
        """
        log_q = jax.nn.log_softmax(student_V / self.temperature, axis=-1)
        listed = jnp.sum(self._terms(teacher.log_p, _at(log_q, teacher.ids)), axis=-1)
        return self._factor * (listed + self._terms(teacher.rest, _rest(log_q, teacher.ids)))

    def _terms(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """Return the terms whose sum over classes is the divergence, from log probabilities."""
        if self.kind == "forward":
            return jnp.exp(log_p) * (log_p - log_q)
        if self.kind == "reverse":
            return jnp.exp(log_q) * (log_q - log_p)
        if self.kind == "total_variation":
            return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)) / 2
        share = self.skew if self.kind == "skew" else self.beta
        log_m = jnp.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
        from_p = jnp.exp(log_p) * (log_p - log_m)
        return from_p if self.kind == "skew" else share * from_p + (1 - share) * jnp.exp(log_q) * (log_q - log_m)


class Listed(NamedTuple):
    """Store the k most probable classes of a distribution, and the probability of all other classes together."""

    ids: jax.Array
    """Classes in ascending order, int32 [..., k]."""
    log_p: jax.Array
    """Log probabilities of the classes `ids`, float32 [..., k]."""
    rest: jax.Array
    """Logarithm of the total probability of the classes that are not in `ids`, float32 [...]; about -1e30 if there are
    none."""

    @classmethod
    def of(cls, logits_V: jax.Array, k: int, temperature: float) -> Listed:
        """Return the k most probable classes of logits [..., V] at a temperature, or all V classes if V is smaller.

        If logits are equal, the class with the lower index comes first, as in `top_classes`.

        >>> Listed.of(jnp.log(jnp.array([0.5, 0.125, 0.375])), 2, 1.0).ids.tolist()
        [0, 2]
        """
        log_p = jax.nn.log_softmax(logits_V / temperature, axis=-1)
        ids = jnp.sort(_best(logits_V, min(k, logits_V.shape[-1])), axis=-1)
        return cls(ids, _at(log_p, ids), _rest(log_p, ids))


@dataclass(frozen=True)
class SoftLoss:
    """Define the loss of a student's outputs: soft * divergence from the teacher + hard * loss on the labels."""

    divergence: Divergence
    soft: Any
    """Weight of the divergence: a number, or an array that broadcasts to the array of divergences."""
    hard: Any
    """Weight of the loss on the labels: a number, or an array that broadcasts to the array of losses."""

    def combined(self, divergence: jax.Array, label_loss: jax.Array) -> jax.Array:
        """Return the weighted sum of a divergence and a loss on the labels."""
        return self.soft * divergence + self.hard * label_loss


def top_classes(logits_V: jax.Array, k: int) -> jax.Array:
    """Return whether each class is one of the k classes with the highest logits, bool [..., V].

    If logits are equal, the class with the lower index comes first, as in `jax.lax.top_k`.
    """
    parts, V = _parts(logits_V), logits_V.shape[-1]
    n = parts.shape[-2]
    # XLA gathers the operand of a top_k that is sharded, but not that of a sort.
    best = jax.lax.top_k(parts, min(k, V // n))[0] if n == 1 else jnp.sort(parts, descending=True)[..., :k]
    best = best.reshape(*logits_V.shape[:-1], -1)
    last = jax.lax.top_k(best, k)[0][..., -1, None, None]
    above, equal = parts > last, (parts == last).astype(jnp.int32)
    room = k - jnp.sum(above, axis=(-2, -1), keepdims=True)
    count_n = jnp.sum(equal, axis=-1, keepdims=True)
    order = jnp.cumsum(equal, axis=-1) + jnp.cumsum(count_n, axis=-2) - count_n
    return (above | ((equal > 0) & (order <= room))).reshape(logits_V.shape)


def _parts(a_V: jax.Array) -> jax.Array:
    """Divide the last axis into the n parts that are on different devices, [..., n, V / n].

    Each device then selects classes of its own part. Devices exchange only a few numbers per part.
    """
    V, n = a_V.shape[-1], meshes.axis_size("tensor")
    n = n if V % n == 0 else 1
    parts = a_V.reshape(*a_V.shape[:-1], n, V // n)
    # With three axes, the last one is the vocabulary of the model, which the mesh shards.
    return meshes.constrain(parts, "batch", "seq", "act_vocab", None) if a_V.ndim == 3 else parts


def _best(logits_V: jax.Array, k: int) -> jax.Array:
    """Return the indices of the k highest logits, int32 [..., k]. If logits are equal, the lower index comes first."""
    parts = _parts(logits_V)
    n, width = parts.shape[-2:]
    if n == 1:
        return jax.lax.top_k(logits_V, k)[1]
    # XLA gathers the operand of a top_k that is sharded, but not that of a sort.
    own = jnp.argsort(parts, axis=-1, descending=True, stable=True)[..., :k]
    values = jnp.take_along_axis(parts, own, axis=-1).reshape(*logits_V.shape[:-1], -1)
    ids = (own + width * jnp.arange(n)[:, None]).reshape(values.shape)
    return jnp.take_along_axis(ids, jax.lax.top_k(values, k)[1], axis=-1)


def _local(ids: jax.Array, n: int, width: int) -> jax.Array:
    """Return the index of each class within each of n parts of the classes, [..., n, k].

    A part has `width` classes. If the class is in another part, the index is `width`.
    """
    local = ids[..., None, :] - width * jnp.arange(n)[:, None]
    return jnp.where((local >= 0) & (local < width), local, width)


def _at(a_V: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the values of the classes `ids` [..., k], from values of all classes [..., V]."""
    parts = _parts(a_V)
    local = _local(ids, *parts.shape[-2:])
    found = jnp.take_along_axis(parts, local, axis=-1, mode="fill", fill_value=0.0)
    return jnp.sum(found, axis=-2)


def _rest(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the logarithm of the sum of probabilities, [...], of all classes except `ids` [..., k]."""
    parts = _parts(log_p)
    local = _local(ids, *parts.shape[-2:])
    others = jnp.put_along_axis(parts, local, EXCLUDED_LOGIT, axis=-1, inplace=False, mode="drop")
    return jax.nn.logsumexp(others, axis=(-2, -1))


def mean_logits(logits: Sequence[jax.Array], temperature: float) -> jax.Array:
    """Average the output distributions of several models, and return logits [..., V] of the average.

    Each model has logits [..., V]. A distribution is softmax(logits / temperature), for the models and for the result.
    """
    if len(logits) == 1:
        return logits[0]
    log_p = jnp.stack([jax.nn.log_softmax(z / temperature, axis=-1) for z in logits])
    return temperature * (jax.nn.logsumexp(log_p, axis=0) - math.log(len(logits)))
