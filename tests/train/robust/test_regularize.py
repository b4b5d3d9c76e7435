"""R-Drop's and SMART's divergences, NEFTune's noise, the distance from the start, and weights of classes by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data.shuffle import Balanced
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import chunked_divergence
from llmctl.train.robust import perturbation, regularize
from llmctl.train.robust.settings import RegularizeConfig

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def outputs(*shape):
    return [jnp.asarray(RNG.normal(size=shape), jnp.float32) for _ in range(2)]


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


BATCHES = {
    "classify": (outputs(3, 4), {"label": jnp.array([0, 1, 3])}),
    "multilabel": (outputs(3, 4), {"label": jnp.eye(4)[:3]}),
    "regress": (outputs(3), {"label": jnp.zeros(3)}),
    "tokens": (outputs(2, 5, 4), {"targets": jnp.zeros((2, 5), jnp.int32), "weights": jnp.ones((2, 5))}),
    "span": (outputs(2, 5, 2), {"start": jnp.array([0, 1]), "end": jnp.array([2, 1]), "among": jnp.ones((2, 5))}),
    "embed": ([unit(y) for y in outputs(6, 4)], {}),
}


@pytest.fixture
def bare(monkeypatch):
    """Let the hidden states of a network be its outputs."""
    monkeypatch.setattr("llmctl.model.functional.outputs", lambda cfg, params, x, batch, dtype: x)


@pytest.mark.parametrize("name", BATCHES)
def test_equal_outputs_have_no_divergence_and_others_have_one_that_is_symmetric(name, bare):
    (y, z), batch = BATCHES[name]

    def apart(a, b):
        return TASKS[name].divergence((None, {}, a), (None, {}, b), batch, jnp.float32)

    value, gradient = jax.value_and_grad(apart)(y, y)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, jnp.zeros_like(y), atol=1e-6)
    assert apart(y, z) > 0.01
    np.testing.assert_allclose(apart(y, z), apart(z, y), rtol=1e-5)


def test_divergences_by_hand(bare):
    y, z = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    sides = (None, {}, y), (None, {}, z)
    there, back = 0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2)
    found = TASKS["classify"].divergence(*sides, {"label": jnp.array([0])}, jnp.float32)
    np.testing.assert_allclose(found, (there + back) / 2, rtol=1e-5)
    numbers = (None, {}, jnp.array([1.0, 2.0])), (None, {}, jnp.array([3.0, 2.5]))
    assert TASKS["regress"].divergence(*numbers, {"label": jnp.zeros(2)}, jnp.float32) == 4.25


def test_a_vocabulary_is_compared_in_chunks_with_gradients_in_both_sides():
    x, other = outputs(2, 4, 3)
    heads = tuple({"w": w} for w in outputs(3, 7))
    weights = jnp.array([[1.0, 1, 0, 1], [0, 1, 1, 0.5]])

    def project(head, x):
        return x @ head["w"]

    def dense(heads, x, other):
        p, q = (jax.nn.log_softmax(project(h, s)) for h, s in zip(heads, (x, other), strict=True))
        return jnp.sum(((jnp.exp(p) - jnp.exp(q)) * (p - q)).sum(-1) / 2 * weights)

    def chunked(heads, x, other):
        return chunked_divergence.symmetric_divergence(project, heads, x, other, weights, 7)

    one, two = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(heads, x, other) for f in (chunked, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)


def test_noise_is_uniform_within_alpha_over_the_root_of_tokens_times_width():
    model = SimpleNamespace(encoder_layers=0, d_model=16)
    segments = (jnp.arange(50) < jnp.array([[50], [10]])).astype(jnp.int32)
    where = perturbation.site(model, {"tokens": segments, "segments": segments})
    noise = np.asarray(regularize.noise(5.0, where, KEY))
    for row, tokens in ((0, 50), (1, 10)):
        most = 5 / np.sqrt(tokens * 16)
        assert most * 0.98 < abs(noise[row]).max() <= most
        np.testing.assert_allclose(np.linalg.norm(noise[row]), 5 / np.sqrt(3), rtol=0.1)  # of a uniform distribution
        assert not noise[row, tokens:].any()
    assert set(where.added({"tokens": segments}, noise)) == {"tokens", "embedding_offset"}
    np.testing.assert_array_equal(where.added({"embedding_offset": 1.0}, noise)["embedding_offset"], noise + 1)


def test_the_distance_from_the_start_has_the_gradient_factor_times_the_difference():
    start = {"decoder/w": jnp.array([1.0, 2.0])}

    def own(params, batch, key, *, memory):
        return jnp.sum(params["head"]["w"]), {"weight": jnp.float32(4)}

    loss = regularize.toward_start(own, 0.5)
    params = {"decoder": {"w": jnp.array([2.0, -1.0])}, "head": {"w": jnp.ones(2)}}
    (total, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, {}, KEY, memory={"start": start})
    assert total == 2 + 4 * 0.5 / 2 * (1 + 9)
    np.testing.assert_allclose(gradients["decoder"]["w"], [4 * 0.5 * 1, 4 * 0.5 * -3])
    np.testing.assert_allclose(gradients["head"]["w"], [1, 1])
    names = ["decoder/w", "head/w"]
    assert regularize.from_parent(names, params) == ["decoder/w"]


def test_new_vectors_before_texts_and_new_heads_are_not_the_parents():
    old = ["decoder/blocks/attn/q/kernel", "embed/tokens"]
    new = [
        "decoder/blocks/attn/prefix/k",
        "embed/prompt",
        "head/out/kernel",
        "decoder/blocks/mlp_adapter/reduce/kernel",
    ]
    assert regularize.from_parent([*old, *new], {}) == old


def test_mixout_is_that_of_the_paper():
    """The paper's form is ((1 - m) w + m w0 - p w0) / (1 - p), for a mask m that is 1 with probability p."""
    rng, p = np.random.default_rng(0), 0.3
    w, w0 = rng.normal(size=(2, 50, 40)).astype(np.float32)
    w0[:, :10] = w[:, :10] = 0  # pruned
    w[:, 10:20] = w0[:, 10:20]  # frozen so far
    cotangent = rng.normal(size=w.shape).astype(np.float32)

    def own(params, batch, key, *, memory):
        assert key is KEY
        return jnp.sum(params["decoder"]["w"] * cotangent), params

    params = {"decoder": {"w": jnp.asarray(w)}, "head": {"w": jnp.ones(2)}}
    loss = jax.value_and_grad(regularize.mixout(own, p), has_aux=True)
    (_, read), gradients = loss(params, {}, KEY, memory={"start": {"decoder/w": jnp.asarray(w0)}})
    got = np.asarray(read["decoder"]["w"])
    m = (np.asarray(gradients["decoder"]["w"]) == 0).astype(np.float32)
    assert abs(m.mean() - p) < 3 * np.sqrt(p * (1 - p) / m.size)
    np.testing.assert_allclose(got, ((1 - m) * w + m * w0 - p * w0) / (1 - p), atol=1e-5)
    np.testing.assert_allclose(gradients["decoder"]["w"], (1 - m) * cotangent / (1 - p), rtol=1e-6)
    np.testing.assert_array_equal(got[:, :20], w[:, :20])  # exactly
    np.testing.assert_array_equal(read["head"]["w"], 1)


def test_weights_of_classes_are_those_of_a_weighted_mean():
    task, options = TASKS["classify"], Options()
    y = jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]))
    batch = task.weighted({"label": jnp.array([0, 1, 1]), "row_weight": jnp.array([1.0, 1, 0])}, jnp.array([2.0, 3.0]))
    total, sums = task.score(y, batch, options)
    np.testing.assert_allclose(total, -2 * np.log(0.5) - 3 * np.log(0.8), rtol=1e-6)
    assert sums["weight"] == 5  # as torch divides: by the weights of the labels
    words = TASKS["tokens"].weighted(
        {"targets": jnp.array([[0, 1, 1]]), "weights": jnp.array([[1.0, 1, 0]])}, jnp.array([2.0, 3.0])
    )
    np.testing.assert_array_equal(words["weights"], [[2, 3, 0]])


def test_balanced_weights_have_the_mean_one_over_the_examples():
    counts = [6, 3, 0, 1]
    found = regularize.class_weights("balanced", list("abcd"), counts)
    np.testing.assert_allclose(found, [10 / 18, 10 / 9, 1, 10 / 3], rtol=1e-6)
    np.testing.assert_allclose(np.dot(found, counts) / sum(counts), 1, rtol=1e-6)
    with pytest.raises(RequestError, match=r"class_weights: no class 'yess', did you mean 'yes'\?; there are no, yes"):
        regularize.class_weights({"yess": 2.0}, ["no", "yes"], [])
    for wrong in ("balance", {"yes": 0}, {"yes": "2"}, {"yes": float("inf")}, {"yes": True}, 3):
        with pytest.raises(ValueError, match='must be "balanced" or a table of numbers above 0 by class, got'):
            RegularizeConfig(class_weights=wrong)


def test_balanced_rows_have_each_class_once_per_block_and_each_example_once_per_epoch_of_its_class():
    labels = np.array([0, 2, 0, 0, 1, 0, 2])
    rows = Balanced(labels, seed=3)
    found = rows(np.arange(24))
    assert (labels[found].reshape(-1, 3) == [0, 1, 2]).all()
    zeros = found[labels[found] == 0]
    assert sorted(zeros[:4]) == sorted(zeros[4:]) == [0, 2, 3, 5] and (zeros[:4] != zeros[4:]).any()
    np.testing.assert_array_equal(np.concatenate([rows(np.array([i])) for i in range(24)]), found)
