"""Importance of heads and neurons, against NumPy; compensation, against NumPy's least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.structured_pruning import compensation, gates, importance, structured
from llmctl.compress.structured_pruning.shrink import target
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.evaluate.tasks.registry import default
from llmctl.model import functional, wiring
from llmctl.model.weights import flatten, layer_of, updated

O, DOWN = "decoder/blocks/attn/o/kernel", "decoder/blocks/mlp/down/kernel"


def of(name, tiny, params, x, stat_of, kind, index=1):
    """The importance of one layer's units, given the inputs `x` of the matrix that reads them."""
    units = next(u for u in wiring.units(tiny, "decoder") if u.name == kind)
    method = StructuredMethod(name)
    stat = importance.statistic(method, x.shape[1], units.count)
    measured = stat and stat.fold(x, jnp.ones(len(x), bool))
    layer = layer_of(params["decoder"]["blocks"], index)
    return importance.of_units(method, units, layer, measured, stat_of, ("decoder", index))


def test_activation_is_the_sum_of_the_norms_of_outputs(tiny, params):
    x = np.random.default_rng(0).normal(size=(10, 16)).astype(np.float32)
    got = of("activation", tiny, params, x, None, "attn/heads")
    np.testing.assert_allclose(
        got, [np.linalg.norm(x[:, 4 * h : 4 * h + 4], axis=1).sum() for h in range(4)], rtol=1e-5
    )
    x = np.random.default_rng(0).normal(size=(10, 24)).astype(np.float32)
    got = of("activation", tiny, params, x, None, "mlp/neurons")
    np.testing.assert_allclose(got, np.abs(x).sum(0), rtol=1e-5)


def test_magnitude_is_the_norm_of_all_weights_of_a_unit(tiny, params):
    w = {path: np.asarray(a)[1] for path, a in flatten(params).items() if path.endswith("/kernel")}
    q, o = w["decoder/blocks/attn/q/kernel"], w[O]
    got = of("magnitude", tiny, params, np.zeros((1, 16), np.float32), None, "attn/heads")
    heads = [slice(4 * h, 4 * h + 4) for h in range(4)]
    np.testing.assert_allclose(got, [np.hypot(np.linalg.norm(q[:, h]), np.linalg.norm(o[h])) for h in heads], rtol=1e-5)
    got = of("magnitude", tiny, params, np.zeros((1, 24), np.float32), None, "mlp/neurons")
    parts = np.concatenate([w["decoder/blocks/mlp/gate/kernel"], w["decoder/blocks/mlp/up/kernel"], w[DOWN].T])
    np.testing.assert_allclose(got, np.linalg.norm(parts, axis=0), rtol=1e-5)


def test_random_depends_on_seed_and_layer_alone(tiny, params):
    x = np.zeros((1, 24), np.float32)
    one, again, other = (of("random", tiny, params, x, None, "mlp/neurons", i) for i in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other) and len(set(one)) == 24


def test_gates_are_the_derivatives_of_the_loss(tiny, params, batches):
    """The gate of a head or neuron scales rows, that of a channel scales a norm's output: by central differences."""
    batches = [
        b | {"targets": np.roll(b["tokens"], -1, 1), "weights": (b["segments"] > 0) * np.float32(1)} for b in batches
    ]
    norm, end = "decoder/blocks/mlp_norm/scale", "decoder/norm/scale"
    got = gates.accumulate(default(tiny), tiny, params, batches, {O: 4, DOWN: 24, norm: 16, end: 16})
    assert {path: a.shape for path, a in got.items()} == {O: (3, 4), DOWN: (3, 24), norm: (3, 16), end: (16,)}
    flat, loss = flatten(params), jax.jit(default(tiny).loss_of(tiny))

    def slope(path, at, batch):
        total = []
        for factor in (1.02, 0.98):
            tree = updated(params, {path: flat[path].at[at].multiply(factor)})
            total.append(float(loss(tree, batch)[0]))
        return (total[0] - total[1]) / 0.04

    for path, index, at in (
        (O, (1, 2), (1, slice(8, 12))), (DOWN, (2, 5), (2, 5)), (norm, (0, 3), (0, 3)), (end, (7,), (7,)),
    ):  # fmt: skip
        want = sum(abs(slope(path, at, batch)) for batch in batches)
        np.testing.assert_allclose(got[path][index], want, rtol=0.02, atol=2e-4, err_msg=path)


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 12)) @ (np.eye(12) + 0.5 * rng.normal(size=(12, 12))) + rng.normal(size=12)
    return x, rng.normal(size=(12, 7)), rng.normal(size=7), np.array([0, 1, 3, 4, 7, 8, 11])


@pytest.mark.parametrize("biased", [False, True])
def test_compensation_is_least_squares(sample, biased):
    x, w, b, kept = sample
    bias = jnp.asarray(b, jnp.float32) if biased else None
    gram, sums = jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(x.sum(0), jnp.float32)
    w32 = jnp.asarray(w, jnp.float32)
    got, new = compensation.compensate(w32, bias, kept, gram, sums, jnp.float32(300), ridge=0.0)
    read = np.concatenate([x[:, kept], np.ones((300, 1))], axis=1) if biased else x[:, kept]
    wanted = np.linalg.lstsq(read, x @ w + (b if biased else 0), rcond=None)[0]
    np.testing.assert_allclose(got[kept], wanted[: len(kept)], atol=1e-4)
    assert not np.asarray(got)[np.setdiff1d(np.arange(12), kept)].any()
    if biased:
        np.testing.assert_allclose(new, wanted[-1], atol=1e-4)


def test_channels_that_are_always_zero_do_not_break_compensation(sample):
    x, w, _, kept = sample
    x = np.where(np.isin(np.arange(12), [3, 5]), 0.0, x)
    gram, sums = jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(x.sum(0), jnp.float32)
    got, _ = compensation.compensate(jnp.asarray(w, jnp.float32), None, kept, gram, sums, jnp.float32(300), ridge=0.0)
    lost = np.linalg.norm(x @ (np.asarray(got) - w))
    best = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0]
    assert np.isfinite(lost) and lost <= 1.001 * np.linalg.norm(x[:, kept] @ best - x @ w)


@pytest.mark.parametrize("name", ["contribution", "activation", "random"])
def test_compensation_makes_the_error_smaller(tiny, params, batches, name):
    smaller = target(tiny, heads=0.5, ffn=0.5)
    found = {}
    for repair in (False, True):
        own = jax.tree.map(jnp.copy, params)
        method = StructuredMethod(name, repair)
        cfg, got, reports = structured.prune_widths(tiny, own, batches, smaller, method=method)
        found[repair] = [r.error for r in reports]
        expected = {path: a.shape for path, a in flatten(functional.abstract(cfg)).items()}
        assert {path: a.shape for path, a in flatten(got).items()} == expected
    assert found[True][0] < 0.9 * found[False][0] and sum(found[True]) < sum(found[False])
