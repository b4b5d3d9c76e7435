"""Divergences versus plain formulas in float64: values, and gradients by central differences."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from central_differences import slope

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import chunked_loss
from llmctl.model.chunked_divergence import distillation, listed_distillation, listed_tokens
from llmctl.model.divergences import Divergence, SoftLoss, mean_logits, top_classes
from llmctl.model.losses import soft_class_sums

N, C = 4, 9
TEACHER, STUDENT = (np.random.default_rng(seed).normal(size=(N, C)) * 2 for seed in (0, 1))
WEIGHTS, LABELS = np.array([1.0, 0.5, 0.0, 2.0]), np.array([0, 3, 8, 5])
NAMES = ("forward", "reverse", "js", "skew", "total_variation")
KINDS = [Divergence(kind, 2.0, 0.3, 0.2, k) for kind in NAMES for k in (0, 3)]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * np.log(p / q), -1)


def reference(how, teacher, student):
    """Return the divergence of logits [N, C], written as a sum of KL divergences of probabilities."""
    p, q = (softmax(z / how.temperature) for z in (teacher, student))
    if how.top_k:
        order = np.argsort(-p, -1, kind="stable")[:, : how.top_k]
        p, q = (np.take_along_axis(a, order, -1) for a in (p, q))
        p, q = (np.concatenate([a, 1 - a.sum(-1, keepdims=True)], -1) for a in (p, q))
    if how.kind == "total_variation":
        return np.sum(np.maximum(p - q, 0), -1)
    m, s = how.beta * p + (1 - how.beta) * q, how.skew * p + (1 - how.skew) * q
    js = how.beta * kl(p, m) + (1 - how.beta) * kl(q, m)
    return how.temperature**2 * {"forward": kl(p, q), "reverse": kl(q, p), "js": js, "skew": kl(p, s)}[how.kind]


@pytest.mark.parametrize("how", KINDS, ids=lambda how: f"{how.kind}-{how.top_k}")
def test_classes_and_tokens_equal_the_plain_formula(how, monkeypatch):
    """The loss and its gradient, of class logits and of tokens in chunks, equal the reference to 1e-5."""

    def plain(student):
        nll = -np.log(np.take_along_axis(softmax(student), LABELS[:, None], -1))[:, 0]
        return np.sum((0.7 * reference(how, TEACHER, student) + 0.2 * nll) * WEIGHTS)

    loss = SoftLoss(how, soft=0.7, hard=0.2)

    def classes(student):
        return soft_class_sums(jnp.asarray(TEACHER), student, LABELS, WEIGHTS, loss)[0]

    def tokens(
        student, stored=False
    ):  # two rows of two tokens, whose hidden states are the logits; one token per chunk
        x, given = (jnp.asarray(a).reshape(2, 2, C) for a in (student, TEACHER))
        sides = [(lambda head, x: x @ head, jnp.eye(C), a) for a in (x, given)]
        targets, weights = LABELS.reshape(2, 2), jnp.asarray(WEIGHTS).reshape(2, 2)
        if stored:  # the teacher's most probable tokens are computed first, as a cache of its outputs does
            kept = listed_tokens([sides[1]], C, how.top_k or C, how.temperature)
            return listed_distillation(sides[0], kept, targets, weights, C, loss)[0]
        return distillation(sides[0], [sides[1]], targets, weights, C, loss)[0]

    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 2 * C)
    want, gradient = plain(STUDENT), slope(plain, STUDENT)
    for fn in (classes, tokens, partial(tokens, stored=True)):
        found, got = jax.jit(jax.value_and_grad(fn))(jnp.asarray(STUDENT, jnp.float32))
        np.testing.assert_allclose(found, want, rtol=1e-5)
        np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-5)
        assert not np.asarray(got)[2].any()  # a token of weight 0


def test_limits_of_the_generalized_forms():
    """js tends to KL(p || q) and KL(q || p) for beta near 0 and 1, and skew to KL(p || q) for a skew near 0."""
    between = [Divergence(k).between(TEACHER, STUDENT) for k in ("forward", "reverse")]
    for beta, weight, want in ((1e-3, 1e-3, between[0]), (1 - 1e-3, 1e-3, between[1])):
        np.testing.assert_allclose(Divergence("js", beta=beta).between(TEACHER, STUDENT) / weight, want, rtol=0.05)
    np.testing.assert_allclose(Divergence("skew", skew=1e-6).between(TEACHER, STUDENT), between[0], rtol=1e-3)
    for k in (C, C + 1):
        np.testing.assert_array_equal(Divergence(top_k=k).between(TEACHER, STUDENT), between[0])


def test_excluded_classes_and_equal_logits():
    """Classes that are not possible add nothing, also in top_k, and of equal logits the first ones are on top."""
    among = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0])
    for how in KINDS:
        loss = SoftLoss(how, soft=1.0, hard=0.0)

        def masked(student, loss=loss):
            return soft_class_sums(TEACHER, student, np.zeros(N, int), WEIGHTS, loss, jnp.asarray(among))[0]

        found, got = jax.value_and_grad(masked)(jnp.asarray(STUDENT, jnp.float32))
        only = among > 0
        want = np.sum(reference(how, TEACHER[:, only], STUDENT[:, only]) * WEIGHTS)
        np.testing.assert_allclose(found, want, rtol=1e-5)
        assert np.isfinite(got).all() and not np.asarray(got)[:, ~only].any()
    many = SoftLoss(Divergence("reverse", top_k=6), soft=1.0, hard=0.0)  # more than are possible
    gradient = jax.grad(lambda s: soft_class_sums(TEACHER, s, LABELS * 0, WEIGHTS, many, jnp.asarray(among))[0])
    assert np.isfinite(gradient(jnp.asarray(STUDENT))).all()
    top = top_classes(jnp.array([[1.0, 2, 2, 2], [0, 0, 0, 0]]), 2)
    np.testing.assert_array_equal(top, [[0, 1, 1, 0], [1, 1, 0, 0]])


def test_listed_classes_of_a_sharded_vocabulary():
    """Devices list tokens of their own part and gather only these; of equal logits, the first ones are listed."""
    logits = np.round(np.random.default_rng(3).normal(size=(2, 3, 64)) * 2).astype(np.float32)  # many are equal
    student = np.random.default_rng(4).normal(size=(2, 3, 64)).astype(np.float32)
    order = np.argsort(-logits, -1, kind="stable")[..., :5]
    mesh, how = meshes.make(MeshConfig(data=2, tensor=4)), Divergence("js", 2.0, 0.3, top_k=5)

    def both(teacher, student):
        listed = listed_tokens([(lambda head, x: x @ head["w"], {"w": jnp.eye(64)}, teacher)], 64, 5, 2.0)
        return listed, how.from_listed(listed, student)

    with meshes.use(mesh):
        sharded = meshes.sharding(("batch", "seq", "act_vocab"), mesh)
        whole = meshes.sharding(("batch", "seq", None), mesh)
        run = jax.jit(both, in_shardings=(whole, sharded))
        listed, found = run(logits, student)
        text = run.lower(logits, student).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathers and not any(re.search(r"\[1,3,64|\[1,3,4,16", line) for line in gathers)
    np.testing.assert_array_equal(listed.ids, np.sort(order, -1))
    p = softmax(logits / 2)
    kept = np.take_along_axis(p, np.sort(order, -1), -1)
    np.testing.assert_allclose(listed.log_p, np.log(kept), rtol=1e-5)
    np.testing.assert_allclose(listed.rest, np.log(1 - kept.sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(found.ravel(), reference(how, logits.reshape(6, 64), student.reshape(6, 64)), rtol=1e-5)


def test_the_mean_of_teachers_is_that_of_their_probabilities():
    found = jax.nn.softmax(mean_logits([TEACHER, STUDENT], 2.0) / 2.0)
    np.testing.assert_allclose(found, (softmax(TEACHER / 2) + softmax(STUDENT / 2)) / 2, rtol=1e-5)
    assert mean_logits([TEACHER], 2.0) is TEACHER


def test_tokens_learn_from_the_mean_of_two_teachers_of_different_widths():
    """The chunked loss equals KL(mean of the teachers' probabilities || student) at the temperature."""
    rng, T = np.random.default_rng(2), 2.0
    given = [(rng.normal(size=(2, 2, d)), rng.normal(size=(d, C))) for d in (3, 5, 4)]
    *teachers, (x, head) = [(jnp.asarray(x), jnp.asarray(head)) for x, head in given]
    sides = [(lambda head, x: x @ head, head, x) for x, head in [*teachers, (x, head)]]
    p = np.mean([softmax(x @ head / T) for x, head in given[:2]], axis=0)
    want = T**2 * np.sum(kl(p, softmax(given[2][0] @ given[2][1] / T)))
    how, ones = SoftLoss(Divergence(temperature=T), soft=1.0, hard=0.0), jnp.ones((2, 2))
    found = distillation(sides[2], sides[:2], ones.astype(int), ones, C, how)[0]
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize(("beta", "kind"), [(0.002, "forward"), (0.998, "reverse")])
def test_js_approaches_a_scaled_kl_divergence_at_both_ends(beta, kind):
    """As the help of `beta` says, and as Agarwal et al. (2023) derive."""
    found = Divergence("js", beta=beta).between(jnp.asarray(TEACHER), jnp.asarray(STUDENT))
    limit = Divergence(kind).between(jnp.asarray(TEACHER), jnp.asarray(STUDENT))
    np.testing.assert_allclose(found / min(beta, 1 - beta), limit, rtol=0.05)
