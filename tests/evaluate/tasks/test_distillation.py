"""The mean of several teachers' outputs for each task, and agreement of a student with it, by plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.evaluate.tasks import embed
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import functional
from llmctl.model.config import ModelConfig

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


AMONG = np.array([[1, 1, 1, 0, 0]] * 4)
ROWS = {"row_weight": jnp.array([1.0, 1.0, 1.0, 0.0])}
Y, Z = (np.random.default_rng(seed).normal(size=(4, 5, 2)) for seed in (2, 3))
SPANS = [[np.argmax(np.where(AMONG > 0, y[..., k], -9), 1) for k in (0, 1)] for y in (Y, Z)]


@pytest.mark.parametrize(("task", "one", "two", "batch", "want"), [
    ("classify", ONE, TWO, ROWS, np.sum(ONE[:3].argmax(1) == TWO[:3].argmax(1))),
    ("multilabel", ONE, np.where([[1], [0], [1], [1]], ONE, -ONE), ROWS, 2),
    ("tokens", Y, Z, {"weights": jnp.asarray(AMONG, jnp.float32)}, np.sum((Y.argmax(-1) == Z.argmax(-1)) * AMONG)),
    ("span", Y, Z, ROWS | {"among": jnp.asarray(AMONG)}, np.mean(np.array(SPANS[0]) == SPANS[1], axis=0)[:3].sum()),
    ("regress", ONE[0], TWO[0], ROWS, None),
])  # fmt: skip
def test_agreement_counts_equal_predictions(task, one, two, batch, want, monkeypatch):
    """The student has the outputs `one` and the teacher `two`; rows and tokens of weight 0 do not count."""
    monkeypatch.setattr(functional, "outputs", lambda cfg, params, x, *_: jnp.asarray(x, jnp.float32))
    found = TASKS[task].agreement((None, {}, one), [(None, {}, two)], batch, jnp.float32)
    assert found == {} if want is None else float(found["agreement"]) == want
    if want is not None:
        assert float(found["weight"]) == (AMONG.sum() if task == "tokens" else 3)


def test_agreement_on_tokens_is_that_of_the_best_tokens_at_the_predicted_positions():
    sizes = {"layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 8, "vocab_size": 7}
    rng, networks, best, logits = np.random.default_rng(0), [], [], []
    places = np.array([[4, 1, 2], [0, 3, 5]])
    for seed, d_model in enumerate((8, 12)):
        cfg = ModelConfig(preset="llama-tiny", d_model=d_model, **sizes)
        params, x = functional.init(cfg, jax.random.key(seed)), rng.normal(size=(2, 6, d_model))
        networks.append((cfg, params, jnp.asarray(x, jnp.float32)))
        logits.append(functional.lm_logits(cfg, params, networks[-1][2]))
        best.append(np.take_along_axis(np.asarray(logits[-1]).argmax(-1), places, 1))
    weights = np.array([[1, 0, 1], [1, 1, 1]])
    full = np.zeros((2, 6), np.float32)
    np.put_along_axis(full, places, weights.astype(np.float32), 1)
    batch = {"targets": jnp.zeros((2, 6), int), "weights": jnp.asarray(full), "places": jnp.asarray(places)}
    found = TASKS["lm"].agreement(networks[0], networks[1:], batch, jnp.float32)
    assert float(found["agreement"]) == np.sum((best[0] == best[1]) * weights) and float(found["weight"]) == 5
    p, q = (np.take_along_axis(np.asarray(jax.nn.softmax(a)), places[..., None], 1) for a in logits)
    np.testing.assert_allclose(found["acceptance"], np.sum(np.minimum(p, q).sum(-1) * weights), rtol=1e-5)
    same = TASKS["lm"].agreement(networks[0], networks[:1] * 2, batch, jnp.float32)
    assert float(same["agreement"]) == 5
