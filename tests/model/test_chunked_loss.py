"""Chunked losses versus the plain formulas: values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import chunked_loss
from llmctl.model.chunked_divergence import distillation
from llmctl.model.divergences import Divergence, SoftLoss

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
    loss, sums = chunked_loss.cross_entropy(
        lambda h, x: x * h, jnp.ones(3), logits, jnp.array([[1]]), jnp.ones((1, 1)), 3
    )
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    assert sums["correct"] == 0 and sums["weight"] == 1


@pytest.mark.parametrize("smoothing, z", [(0.0, 0.0), (0.1, 1e-2)])
def test_values_and_gradients_equal_the_plain_form(given, monkeypatch, smoothing, z):
    head, x, targets, weights = given
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * B * V * 2)  # two tokens a chunk
    assert chunked_loss.chunk_length(B, T, V) == 2

    def plain(head, x):
        log_p = jax.nn.log_softmax(project(head, x))
        one_hot = jax.nn.one_hot(targets, V) * (1 - smoothing) + smoothing / V
        loss = -jnp.sum(one_hot * log_p, -1) + z * jax.nn.logsumexp(project(head, x), axis=-1) ** 2
        return 3.0 * jnp.sum(loss * weights)

    def ours(head, x):
        return 3.0 * chunked_loss.cross_entropy(project, head, x, targets, weights, V, smoothing, z)[0]

    want, got = (jax.value_and_grad(f, argnums=(0, 1))(head, x) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), want, got)


def test_token_nll(given):
    head, x, targets, _ = given
    want = -jnp.take_along_axis(jax.nn.log_softmax(project(head, x)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(chunked_loss.token_nll(project, head, x, targets, V), want, rtol=1e-5, atol=1e-6)


def test_distillation_gradients_and_identity(given):
    head, x, targets, weights = given
    teacher = jax.tree.map(lambda a: a * 0.5, head)
    how = SoftLoss(Divergence(temperature=2.0), soft=0.75, hard=0.25)

    def plain(head):
        t, s = jax.nn.log_softmax(project(teacher, x) / 2.0), jax.nn.log_softmax(project(head, x) / 2.0)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(project(head, x)), targets[..., None], -1)[..., 0]
        return jnp.sum((0.75 * 4.0 * jnp.sum(jnp.exp(t) * (t - s), -1) + 0.25 * nll) * weights)

    def ours(head):
        return distillation((project, head, x), [(project, teacher, x)], targets, weights, V, how)[0]

    want, got = (jax.value_and_grad(f)(head) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), want, got)
    how = SoftLoss(Divergence(temperature=2.0), soft=1.0, hard=0.0)
    _, sums = distillation((project, head, x), [(project, head, x)], targets, weights, V, how)
    np.testing.assert_allclose(sums["kl"], 0.0, atol=1e-5)


def test_integer_leaves_of_a_quantized_head_have_no_gradient(given):
    _, x, targets, weights = given
    head = {"q": jnp.ones((D, V), jnp.int8), "scale": jnp.ones(V)}

    def loss(x):
        return chunked_loss.cross_entropy(
            lambda h, x: x @ h["q"].astype(x.dtype) * h["scale"], head, x, targets, weights, V
        )[0]

    assert jnp.isfinite(jax.grad(loss)(x)).all()


MESHES = [{"data": 1, "tensor": 8}, {"data": 2, "context": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["labels", "teacher", "top"])
def test_a_split_vocabulary_stays_split(axes, kind, monkeypatch):
    """Equal to one device; between devices move the head's columns, its gradient and numbers a token, never logits."""
    b, t, d, v = 4, 32, 16, 1024
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 4 * 512 * 2)
    rng = np.random.default_rng(0)
    head = {"w": rng.normal(size=(d, v)).astype(np.float32)}
    x = rng.normal(size=(b, t, d)).astype(np.float32)
    targets, weights = rng.integers(0, v, (b, t), np.int32), rng.random((b, t), np.float32)

    def product(head, x):
        return x @ head["w"]

    def value(head, x, targets, weights):
        if kind == "labels":
            return chunked_loss.cross_entropy(product, head, x, targets, weights, v, 0.1, 1e-3)
        teacher = jax.tree.map(lambda a: a * 0.5, head)
        how = SoftLoss(Divergence("js", temperature=2.0, top_k=9) if kind == "top" else Divergence(), 0.75, 0.25)
        return distillation((product, head, x), [(product, teacher, x)], targets, weights, v, how)

    step = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    want = jax.jit(step)(head, x, targets, weights)
    mesh = meshes.make(MeshConfig(**axes))
    rows = [meshes.sharding(["batch", "seq", None][: a.ndim], mesh) for a in (x, targets, weights)]
    columns = {"w": meshes.sharding(["embed", "vocab"], mesh)}
    placed = jax.device_put((head, x, targets, weights), (columns, *rows))
    with meshes.use(mesh):
        compiled = jax.jit(step).lower(*placed).compile()
    got = compiled(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)
    share = v // axes["tensor"]
    moved = []
    for result in re.findall(r"= (\(?\w+\[.*?) (?:all-|reduce-scatter|collective-)[\w-]*\(", compiled.as_text()):
        moved += [tuple(int(n) for n in s.split(",") if n) for s in re.findall(r"\w+\[([\d,]*)\]", result)]
    assert any(len(shape) in (1, 2) and np.prod(shape) <= b * t for shape in moved if shape)  # log-sum-exp and hits
    assert all(v not in shape for shape in moved), moved
    assert all(shape == (d, share) for shape in moved if share in shape), moved


def test_chunks_are_those_of_a_device(monkeypatch):
    """Chunks do not get smaller on a larger mesh: what counts is a device's share of the rows and the vocabulary."""
    seen = []
    real = chunked_loss.chunk_length
    monkeypatch.setattr(chunked_loss, "chunk_length", lambda *sizes: seen.append(sizes) or real(*sizes))
    ones = jnp.ones((8, 16))
    with meshes.use(meshes.make(MeshConfig(data=2, context=2, tensor=2))):
        jax.eval_shape(
            lambda x: chunked_loss.cross_entropy(lambda h, x: x @ h, jnp.ones((4, 64)), x, ones.astype(int), ones, 64),
            jnp.ones((8, 16, 4)),
        )
    assert set(seen) == {(4, 8, 32)}
