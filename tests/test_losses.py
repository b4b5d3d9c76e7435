"""Chunked losses against the plain formulas, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl import losses

B, T, D, V = 3, 8, 5, 11


def project(head, x):
    return x @ head["w"] + head["b"]


@pytest.fixture(scope="module")
def given():
    k = jax.random.split(jax.random.key(0), 6)
    head = {"w": jax.random.normal(k[0], (D, V)), "b": jax.random.normal(k[1], (V,))}
    x = jax.random.normal(k[2], (B, T, D))
    targets = jax.random.randint(k[3], (B, T), 0, V)
    weights = jax.random.bernoulli(k[4], 0.7, (B, T)).astype(jnp.float32)
    return head, x, targets, weights


def test_hand_computed_value():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    loss, sums = losses.cross_entropy(lambda h, x: x * h, jnp.ones(3), logits, jnp.array([[1]]), jnp.ones((1, 1)), 3)
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    assert sums["correct"] == 0 and sums["weight"] == 1


@pytest.mark.parametrize("smoothing, z", [(0.0, 0.0), (0.1, 1e-2)])
def test_values_and_gradients_equal_the_plain_form(given, monkeypatch, smoothing, z):
    head, x, targets, weights = given
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * B * V * 2)  # two tokens a chunk
    assert losses.chunk_length(B, T, V) == 2

    def plain(head, x):
        log_p = jax.nn.log_softmax(project(head, x))
        one_hot = jax.nn.one_hot(targets, V) * (1 - smoothing) + smoothing / V
        loss = -jnp.sum(one_hot * log_p, -1) + z * jax.nn.logsumexp(project(head, x), axis=-1) ** 2
        return 3.0 * jnp.sum(loss * weights)

    def ours(head, x):
        return 3.0 * losses.cross_entropy(project, head, x, targets, weights, V, smoothing, z)[0]

    want, got = (jax.value_and_grad(f, argnums=(0, 1))(head, x) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), want, got)


def test_token_nll(given):
    head, x, targets, _ = given
    want = -jnp.take_along_axis(jax.nn.log_softmax(project(head, x)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.token_nll(project, head, x, targets, V), want, rtol=1e-5, atol=1e-6)


def test_distillation_gradients_and_identity(given):
    head, x, targets, weights = given
    teacher = jax.tree.map(lambda a: a * 0.5, head)
    args = (targets, weights, V)

    def plain(head):
        t, s = jax.nn.log_softmax(project(teacher, x) / 2.0), jax.nn.log_softmax(project(head, x) / 2.0)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(project(head, x)), targets[..., None], -1)[..., 0]
        return jnp.sum((0.75 * 4.0 * jnp.sum(jnp.exp(t) * (t - s), -1) + 0.25 * nll) * weights)

    def ours(head):
        return losses.distillation(project, head, x, project, teacher, x, *args, temperature=2.0, hard=0.25)[0]

    want, got = (jax.value_and_grad(f)(head) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), want, got)
    _, sums = losses.distillation(project, head, x, project, head, x, *args, temperature=2.0, hard=0.0)
    np.testing.assert_allclose(sums["kl"], 0.0, atol=1e-5)


def test_integer_leaves_of_a_quantized_head_have_no_gradient(given):
    _, x, targets, weights = given
    head = {"q": jnp.ones((D, V), jnp.int8), "scale": jnp.ones(V)}

    def loss(x):
        return losses.cross_entropy(lambda h, x: x @ h["q"].astype(x.dtype) * h["scale"], head, x, targets, weights, V)[
            0
        ]

    assert jnp.isfinite(jax.grad(loss)(x)).all()
