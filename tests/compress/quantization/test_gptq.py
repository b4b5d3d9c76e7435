"""GPTQ equals a plain reference in float64, has less error than rounding, and keeps zeros."""

import jax
import numpy as np
import pytest

from llmctl.compress import error_feedback
from llmctl.compress.quantization import gptq, grids
from llmctl.compress.quantization.grids import GRIDS
from llmctl.compress.quantization.schemes import SCHEMES, inputs_per_scale
from llmctl.model.weights import dense
from llmctl.model.weights.nf4 import LEVELS


def layer(seed=0, inputs=24, outputs=10, tokens=200):
    """Gram matrix of correlated inputs of uneven sizes, and a matrix."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)))
    x *= np.exp(0.5 * rng.normal(size=inputs))
    return (x.T @ x).astype(np.float32), rng.normal(size=(inputs, outputs)).astype(np.float32)


ZEROS = "int4 with zero points"
EVERY = {**GRIDS, ZEROS: grids.ASYMMETRIC["int4"]}


def scale_of(w, name):
    """Return the scales of one group of weights [K, O], and their zero points if there are any."""
    if name == ZEROS:
        low, high = np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0)
        return (high - low) / 15, np.round(-low * 15 / (high - low)) - 8
    return np.abs(w).max(axis=0) / {"int8": 127.5, "int4": 7.5, "nf4": 1.0}[name]


def nearest(w, scale, name):
    if name == "nf4":
        return LEVELS[np.argmin(np.abs(w / scale - LEVELS[:, None]), axis=0)] * scale
    if name == ZEROS:
        step, zero = scale
        return (np.clip(np.round(w / step) + zero, -8, 7) - zero) * step
    top = {"int8": 127, "int4": 7}[name]
    return np.clip(np.round(w / scale), -top, top) * scale


def reference(w, gram, name, group, act_order, static, damping=0.01):
    """The paper's algorithm, one input at a time and without blocks, with the inverse Hessian of numpy."""
    w, hessian = w.astype(float).copy(), gram.astype(float)
    original, group = w.copy(), group or len(w)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(w))
    hessian = hessian[np.ix_(order, order)] + damping * np.mean(np.diag(hessian)) * np.eye(len(w))
    upper, out = np.linalg.cholesky(np.linalg.inv(hessian)).T, np.zeros_like(w)
    w = w[order]
    for i, row in enumerate(order):
        first = row - row % group
        if static:
            scale = scale_of(original[first : first + group], name)
        elif i % group == 0:
            scale = scale_of(w[i : i + group], name)
        out[row] = nearest(w[i], scale, name)
        w[i:] -= np.outer(upper[i, i:], (w[i] - out[row]) / upper[i, i])
    return out


def error(gram, w, new):
    lost = np.asarray(new, float) - w
    return float(np.sum(lost * (gram.astype(float) @ lost)))


@pytest.mark.parametrize(("name", "group", "act_order", "static"), [
    ("int4", 0, True, True), ("int4", 6, True, True), ("int4", 6, False, False), ("int8", 0, False, True),
    ("nf4", 12, True, True), (ZEROS, 6, True, True), (ZEROS, 6, False, False), (ZEROS, 0, False, True),
])  # fmt: skip
def test_weights_equal_a_reference(name, group, act_order, static):
    gram, w = layer()
    got, attempts = gptq.quantize(
        w, gram, grid=EVERY[name], group=group, act_order=act_order, static_groups=static, block=9
    )
    expected = reference(w, gram, name, group, act_order, static)
    np.testing.assert_allclose(dense(got), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert attempts == 0


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("group", [0, 8])
def test_a_grid_rounds_as_its_scheme(name, group):
    _, w = layer(inputs=64)
    group = inputs_per_scale(name, group)
    expected = jax.jit(SCHEMES[name], static_argnums=(1, 2))(w, -2, group)
    got = grids.rounded(w, None, grid=GRIDS[name], group=group, clip=False)
    for a, b in zip(got.parts().values(), expected.parts().values(), strict=True):
        assert a.dtype == b.dtype
        if name in ("int8", "int4") and b.dtype == name:  # the scheme gives a lowest weight -7 or -8 of 7.5 steps
            b = np.maximum(np.asarray(b, int), -GRIDS[name].bound + 0.5)
        np.testing.assert_array_equal(a, b)


def test_less_error_than_rounding():
    gram, w = layer(inputs=64, outputs=32, tokens=500)
    for group in (0, 16):
        nearest = grids.rounded(w, None, grid=GRIDS["int4"], group=group, clip=False)
        got, _ = gptq.quantize(w, gram, grid=GRIDS["int4"], group=group)
        assert error(gram, w, dense(got)) < 0.6 * error(gram, w, dense(nearest))


def test_zeros_stay_zeros():
    gram, w = layer()
    w[::3] = 0
    w[:, 0] = 0
    for grid in EVERY.values():
        got, _ = gptq.quantize(w, gram, grid=grid, group=8)
        assert np.all(np.asarray(dense(got))[w == 0] == 0)


def test_inputs_that_are_always_zero_are_rounded_and_change_no_others():
    gram, w = layer()
    dead = np.arange(24) % 4 == 1
    gram[dead] = gram[:, dead] = 0
    got = np.asarray(dense(gptq.quantize(w, gram, grid=GRIDS["int4"])[0]))
    nearest = np.asarray(dense(grids.rounded(w, None, grid=GRIDS["int4"], group=0, clip=False)))
    np.testing.assert_array_equal(got[dead], nearest[dead])
    assert np.isfinite(got).all() and np.any(got[~dead] != nearest[~dead])


def test_without_an_inverse_the_weights_are_rounded():
    gram, w = layer()
    gram[2, 5] = gram[5, 2] = np.nan
    got, attempts = gptq.quantize(w, gram, grid=GRIDS["int4"], group=8)
    nearest = grids.rounded(w, None, grid=GRIDS["int4"], group=8, clip=False)
    np.testing.assert_array_equal(dense(got), dense(nearest))
    assert attempts == error_feedback.ATTEMPTS
    assert gptq.fallback(int(attempts), 0.01) == "rounding to nearest: the Hessian has no inverse"


def test_the_clipping_search_lowers_the_error_it_minimizes():
    gram, w = layer(inputs=64, outputs=32)
    w[::16] *= 3
    for read, name in ((None, "int4"), (gram, "int4"), (gram, ZEROS)):
        plain, clipped = (grids.rounded(w, read, grid=EVERY[name], group=64, clip=clip) for clip in (False, True))
        least, most = (error(np.eye(64) if read is None else gram, w, dense(node)) for node in (clipped, plain))
        assert least < 0.97 * most
