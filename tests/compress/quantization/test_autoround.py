"""AutoRound: the start is rounding to nearest, gradients by hand, less error of a layer's output, and one result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration.calibrate import walk
from llmctl.compress.quantization import autoround, grids
from llmctl.compress.quantization.asymmetric import AsymmetricIntegers
from llmctl.compress.quantization.autoround import Tuned
from llmctl.compress.quantization.levels import Integers
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.quantize_report import records
from llmctl.compress.quantization.quantize_walk import collector, quantize_layer, tuner
from llmctl.model import weights
from llmctl.model.weights import dense


def quantized(cfg, params, batches, method):
    tuners = {}

    def change(visit):
        if method.tunes and visit.stack not in tuners:
            tuners[visit.stack] = tuner(cfg, visit.layer, visit.stack, method, jnp.float32)
        layer, visit.notes["matrices"] = quantize_layer(cfg, visit, method, tuners.get(visit.stack))
        return layer

    return walk(cfg, jax.tree.map(jnp.copy, params), batches, collector(method), change)


@pytest.mark.parametrize("settings", [
    pytest.param({"scheme": "int2", "rules": (("attn/*", "int4"), ("o", "none"))}, marks=pytest.mark.slow),
    {"scheme": "int3", "symmetric": False},
], ids=str)  # fmt: skip
def test_layers_err_clearly_less_than_rounded_ones(tiny, params, batches, settings):
    """The first layer has the same inputs in both; rounding searches for its scales."""
    tuning = Quantization(**settings, group=8, method="autoround", tuning_steps=60)
    got, reports = quantized(tiny, params, batches, tuning)
    clipped = quantized(tiny, params, batches, Quantization(**settings, group=8, clip=True))[1]
    assert reports[0].error < 0.7 * clipped[0].error
    found = records(reports)[0]["tuning"]
    assert 0 < found["step"] <= 60
    if "rules" in settings:
        nearest = quantized(tiny, params, batches, Quantization(**settings, group=8))[1]
        assert found["error_ratio"] == pytest.approx((reports[0].error / nearest[0].error) ** 2, rel=0.01)
        again, _ = quantized(tiny, params, batches, tuning)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("grid", [Integers(4), Integers(2), AsymmetricIntegers(3)], ids=str)
def test_the_start_is_rounding_to_nearest_and_zeros_stay(grid):
    w = jax.random.normal(jax.random.key(0), (24, 5)).at[::4].set(0.0)
    start = Tuned.start(w, 8)
    nearest = dense(grids.rounded(w, None, grid=grid, group=8, clip=False))
    np.testing.assert_array_equal(dense(autoround.finished(w, start, grid, 8)), nearest)
    keys = jax.random.split(jax.random.key(1), 3)
    state = Tuned(*(jax.random.uniform(k, a.shape, minval=0.5) - (i == 0)
                    for i, (k, a) in enumerate(zip(keys, start, strict=True))))  # fmt: skip
    node = autoround.finished(w, state, grid, 8)
    np.testing.assert_allclose(dense(node), autoround._value(w, state, grid, 8), rtol=1e-6)
    assert np.all(np.asarray(dense(node))[::4] == 0) and np.any(np.asarray(dense(node)) != nearest)


def test_gradients_and_a_step_by_hand():
    """Of two weights one is beyond the highest level, so its offset gets no gradient."""
    grid, w = Integers(2), jnp.array([[3.0], [-0.9], [0.7]])
    state = Tuned(jnp.zeros((3, 1)), jnp.ones((1, 1)), jnp.full((1, 1), 0.5))  # scale 1.5 / 1.5
    factor = jnp.array([[2.0], [-3.0], [5.0]])
    gradient = jax.grad(lambda t: jnp.sum(factor * autoround._value(w, t, grid, 0)))(state)
    np.testing.assert_allclose(gradient.offset_IO, [[0.0], [-3.0], [5.0]])
    assert gradient.low_GO == 0
    # scale s = 3 h / 1.5; d(level * s)/dh = 2 * level for the clipped weight, and 2 * (level - w / s) for the others
    expected = 2 * (2.0 * 1 + -3.0 * (-1 + 0.9) + 5.0 * (1 - 0.7))
    np.testing.assert_allclose(gradient.high_GO, [[expected]], rtol=1e-5)
    new = state.step(gradient, jnp.float32(0.3)).step(gradient, jnp.float32(0.3))
    np.testing.assert_allclose(new.offset_IO, [[0.0], [0.5], [-0.5]])
    np.testing.assert_allclose((new.low_GO, new.high_GO), [[[1.0]], [[0.0]]], atol=1e-6)


def test_a_matrix_of_the_head_is_rounded_and_named(tiny, params, batches):
    from llmctl.compress.calibration.calibrate import HEAD, Visit
    from llmctl.compress.quantization.quantize_walk import NOT_TUNED

    method = Quantization("int4", method="autoround", head=True)
    visit = Visit(HEAD, 0, {"lm_head": {"kernel": jnp.ones((4, 2))}}, {})
    layer, notes = quantize_layer(tiny, visit, method)
    assert notes["lm_head"]["fallback"] == NOT_TUNED
    assert not weights.is_plain(layer["lm_head"]["kernel"])
