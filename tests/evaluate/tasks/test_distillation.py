"""The mean of several teachers' outputs for each task, and agreement of a student with it, by plain numpy."""

import jax.numpy as jnp
import numpy as np

from llmctl.evaluate.tasks import embed
from llmctl.evaluate.tasks.registry import TASKS

ONE, TWO = (np.random.default_rng(seed).normal(size=(4, 5)) for seed in (0, 1))


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def mean(task, batch, *outputs, temperature=2.0):
    return np.asarray(TASKS[task].mean_output([jnp.asarray(y) for y in outputs], batch, temperature))


def test_means_of_probabilities_and_numbers():
    want = (softmax(ONE / 2) + softmax(TWO / 2)) / 2
    np.testing.assert_allclose(softmax(mean("classify", {}, ONE, TWO) / 2), want, rtol=1e-5)
    want = (1 / (1 + np.exp(-ONE / 2)) + 1 / (1 + np.exp(-TWO / 2))) / 2
    np.testing.assert_allclose(1 / (1 + np.exp(-mean("multilabel", {}, ONE, TWO) / 2)), want, rtol=1e-5)
    np.testing.assert_allclose(mean("regress", {}, ONE[0], TWO[0]), (ONE[0] + TWO[0]) / 2, rtol=1e-5)


def test_spans_average_over_the_tokens_that_are_possible():
    among = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    one, two = (np.stack([a, b], -1) for a, b in ((ONE[:2], ONE[2:]), (TWO[:2], TWO[2:])))
    masked = [np.where(among[..., None] > 0, y, -1e30) for y in (one, two)]
    want = (softmax(masked[0] / 2, 1) + softmax(masked[1] / 2, 1)) / 2
    found = np.where(among[..., None] > 0, mean("span", {"among": jnp.asarray(among)}, one, two), -1e30)
    np.testing.assert_allclose(softmax(found / 2, 1), want, rtol=1e-5, atol=1e-7)


def test_similarities_of_embeddings_average_over_models_of_different_widths():
    units = [y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (ONE, TWO[:, :3])]
    batch = {"pair_tokens": jnp.ones((2, 1)), "label": jnp.zeros(2)}
    found = embed.similarities(jnp.asarray(mean("embed", batch, *units)), batch)
    each = [embed.similarities(jnp.asarray(u), batch) for u in units]
    np.testing.assert_allclose(found, (each[0] + each[1]) / 2, rtol=1e-5)
