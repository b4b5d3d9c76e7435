"""FGM, PGD and FreeLB of a classifier whose gradients are written in numpy: steps, losses and gradients of weights."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.train.robust import one_pass, perturbation
from llmctl.train.robust.registry import ADVERSARIES
from llmctl.train.robust.settings import AdversarialConfig

V, D, C = 11, 3, 4
MODEL = SimpleNamespace(encoder_layers=0, d_model=D)
PROBLEM = SimpleNamespace(model=MODEL, task=SimpleNamespace(model_inputs=lambda batch: batch))
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (5, 6))
MASK = (np.arange(6) < np.array([6, 4, 1, 3, 5])[:, None]).astype(np.float64)
LABEL = RNG.integers(0, C, 5)
TABLE, KERNEL = RNG.normal(size=(V, D)), RNG.normal(size=(D, C)) * 2
BATCH = {"tokens": TOKENS, "segments": MASK.astype(np.int32), "label": LABEL}
KEY = jax.random.key(0)


def own(params, batch, key):
    """The loss in JAX: softmax of the mean of tanh(embedding) over the tokens, times a matrix."""
    x = jnp.take(params["embed"]["tokens"], batch["tokens"], axis=0) + batch.get("embedding_offset", 0.0)
    mask = batch["segments"][..., None]
    mean = jnp.sum(jnp.tanh(x) * mask, axis=1) / mask.sum(1)
    log_p = jax.nn.log_softmax(mean @ params["kernel"])
    total = -jnp.take_along_axis(log_p, batch["label"][:, None], 1).sum()
    return total, {"loss": total, "weight": jnp.float32(len(log_p))}


def by_hand(offset):
    """The same loss in numpy, with its gradients in the table, the matrix and the embeddings."""
    h = np.tanh(TABLE[TOKENS] + offset)
    share = MASK[..., None] / MASK.sum(1)[:, None, None]
    mean = (h * share).sum(1)
    p = np.exp(mean @ KERNEL)
    p /= p.sum(1, keepdims=True)
    off = p - np.eye(C)[LABEL]
    rises = (off @ KERNEL.T)[:, None] * share * (1 - h**2)
    table = np.zeros_like(TABLE)
    np.add.at(table, TOKENS, rises)
    loss = -np.log(p[np.arange(5), LABEL]).sum()
    return loss, {"embed": {"tokens": table}, "kernel": mean.T @ off}, rises


def unit(norm):
    """Euclidean norm of each row's embeddings, or the root mean square of their entries."""
    square = (TABLE[TOKENS] ** 2 * MASK[..., None]).sum((1, 2))
    return np.sqrt(square if norm == "l2" else square / (MASK.sum(1) * D))[:, None, None]


def length(x):
    return np.sqrt((x**2).sum((1, 2), keepdims=True))


def step(offset, rises, norm, size, epsilon):
    """One step of projected ascent."""
    if norm == "linf":
        return np.clip(offset + size * unit(norm) * np.sign(rises), -epsilon * unit(norm), epsilon * unit(norm))
    moved = offset + size * unit(norm) * rises / length(rises)
    return moved * np.minimum(1, epsilon * unit(norm) / length(moved))


def mixed(weight, a, b):
    return jax.tree.map(lambda x, y: (1 - weight) * x + weight * y, a, b)


def found(**settings):
    """Loss, sums and gradients of a method, compiled."""
    config = AdversarialConfig(**settings)
    method = ADVERSARIES[config.method]
    loss = method.loss(config, PROBLEM, own)
    params = {"embed": {"tokens": jnp.asarray(TABLE, jnp.float32)}, "kernel": jnp.asarray(KERNEL, jnp.float32)}
    (total, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, BATCH, KEY)
    return total, sums, gradients


def assert_equal(found, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, want)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fgm_is_one_step_along_the_gradient(norm):
    total, sums, gradients = found(method="fgm", epsilon=0.2, norm=norm, weight=0.25)
    clean = by_hand(0.0)
    perturbed = by_hand(step(np.zeros((5, 6, D)), clean[2], norm, 0.2, 0.2))
    assert perturbed[0] > clean[0]
    assert_equal((total, gradients), mixed(0.25, clean[:2], perturbed[:2]))
    assert_equal((sums["loss"], sums["weight"]), (clean[0], 5))


@pytest.mark.parametrize(("norm", "weight"), [("l2", 1.0), ("linf", 0.5)])
def test_pgd_projects_each_step(norm, weight):
    settings = {"epsilon": 0.6, "norm": norm, "steps": 3, "step_size": 0.4, "start": 0.0}
    total, sums, gradients = found(method="pgd", **settings, weight=weight)
    offset = np.zeros((5, 6, D))
    for _ in range(3):
        offset = step(offset, by_hand(offset)[2], norm, 0.4, 0.6)
    size = length(offset) / unit(norm) if norm == "l2" else abs(offset).max((1, 2)) / unit(norm)[:, 0, 0]
    np.testing.assert_allclose(size.ravel(), 0.6)
    clean, perturbed = by_hand(0.0), by_hand(offset)
    assert_equal((total, gradients), mixed(weight, clean[:2], perturbed[:2]))
    assert_equal(sums["loss"], perturbed[0])


def test_freelb_is_the_mean_of_the_gradients_of_its_steps():
    total, sums, gradients = found(method="freelb", epsilon=0.9, steps=3, step_size=0.4, start=0.0)
    offset, passes = np.zeros((5, 6, D)), []
    for _ in range(3):
        passes.append(by_hand(offset))
        offset = step(offset, passes[-1][2], "l2", 0.4, 0.9)
    mean = jax.tree.map(lambda *each: sum(each) / 3, *[p[:2] for p in passes])
    assert_equal((total, gradients), mean)
    assert_equal((sums["loss"], sums["weight"]), (mean[0], 5))


def test_one_step_of_freelb_from_zero_is_plain_training():
    total, sums, gradients = found(method="freelb", steps=1, start=0.0)
    plain, want, _ = by_hand(0.0)
    assert_equal((total, sums["loss"], gradients), (plain, plain, want))


def test_a_random_start_lies_in_its_ball_and_leaves_padding_alone():
    where = perturbation.site(MODEL, jax.tree.map(jnp.asarray, BATCH))
    params = {"embed": {"tokens": jnp.asarray(TABLE, jnp.float32)}}
    for norm, sizes in (("l2", lambda x: np.asarray(perturbation.length(x))), ("linf", lambda x: abs(x).max((1, 2)))):
        search = perturbation.Search.of({"epsilon": 2.0, "start": 0.5, "norm": norm}, where, params)
        np.testing.assert_allclose(search.size_B11, unit(norm), rtol=1e-5)
        begin = search.begin(where, KEY)
        relative = np.ravel(sizes(begin)) / unit(norm).ravel()
        assert (relative <= 0.5).all() and (relative > 0.05).all()
        moved = search.ascend(begin, jnp.ones_like(begin))  # gradients at padding are ignored
        for offset in (begin, moved):
            assert not np.asarray(offset)[MASK == 0].any() and np.asarray(offset)[MASK > 0].all()


def test_a_tiny_gradient_has_a_direction_and_no_gradient_has_none():
    where = perturbation.site(MODEL, jax.tree.map(jnp.asarray, BATCH))
    search = perturbation.Search(where.mask_BT1, jnp.ones((5, 1, 1)), epsilon=3.0, step_size=3.0)
    tiny = where.uniform(KEY) * 1e-30  # its square is zero in float32
    np.testing.assert_allclose(perturbation.length(search.ascend(where.zeros(), tiny)), 3.0, rtol=1e-5)
    assert not search.ascend(where.zeros(), where.zeros()).any()


def test_gradients_are_computed_of_trained_arrays_alone():
    """The base of an adapter costs no gradients, and integers have none."""
    counts = []

    def passes(pull, trained, rest):
        value, gradients, _ = pull(jnp.zeros(3))
        counts.append(len(gradients))
        return value, gradients

    def loss(trained, offset, rest):
        total = jnp.sum(trained["a"] * (trained["frozen"] + offset) * trained["integers"])
        return total, {"weight": rest}

    frozen = {"frozen": jnp.arange(3.0), "integers": jnp.array([1, 2, 3])}

    def of(a):
        return one_pass.with_gradients(loss, passes, {"a": a, **frozen}, jnp.float32(2))

    (total, sums), gradient = jax.value_and_grad(of, has_aux=True)(jnp.ones(3))
    assert counts == [1]
    np.testing.assert_allclose(gradient, [0, 2, 6])
    assert (float(total), float(sums["weight"])) == (8, 2)
    np.testing.assert_allclose(of(jnp.ones(3))[0], 8)  # without a gradient too


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"epsilon": 1.0}, "epsilon: nothing is perturbed without a method"),
        ({"method": "fgm", "steps": 3}, "steps: not for method 'fgm', which reads epsilon, norm, weight"),
        ({"method": "freelb", "weight": 0.5}, "weight: not for method 'freelb'"),
        ({"method": "pgd", "weight": 1.5}, "weight: 1.5 is no share of the loss"),
        ({"method": "pgd", "epsilon": 1.0, "start": 5.0}, "start: 5 is beyond epsilon = 1"),
        ({"method": "smart", "start": 0.0}, "start: method 'smart' needs one above 0"),
        ({"method": "frelb"}, "unknown adversary 'frelb', did you mean 'freelb'"),
    ],
    ids=str,
)
def test_a_setting_that_would_do_nothing_is_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        AdversarialConfig(**settings)


def test_the_operations_of_a_step():
    of = {m: ADVERSARIES[m].cost(AdversarialConfig(method=m)) for m in ADVERSARIES.own}
    assert of == {"fgm": 2, "pgd": pytest.approx(3), "freelb": 3, "smart": pytest.approx(3)}
    assert ADVERSARIES["freelb"].cost(AdversarialConfig(method="freelb", steps=5)) == 5
