"""Integers with zero points: values and bytes by hand, tables, zeros, and less error on weights beside 0."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.quantization.quantize import quantize
from llmctl.model import functional, weights
from llmctl.model.weights import Packed, Quantized, dense, flatten

BITS = [8, 4, 3, 2]


def reference(w, bits, group):
    """Round a matrix [I, O] in float64: levels from the lowest to the highest weight of a group, 0 included."""
    out = np.zeros(w.shape)
    for first in range(0, len(w), group):
        part = w[first : first + group].astype(float)
        low, high = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
        step = np.where(high > low, (high - low) / (2**bits - 1), 1)
        zero = np.round(-low / step)
        out[first : first + group] = (np.clip(np.round(part / step) + zero, 0, 2**bits - 1) - zero) * step
    return out


def skewed(shape, seed=0):
    """Weights of which most are positive; a group of outputs is only positive, one only negative, and one is 0."""
    w = np.random.default_rng(seed).gamma(2.0, size=shape).astype(np.float32) - 0.5
    w[..., 0], w[..., 1], w[..., 2] = np.abs(w[..., 0]), -np.abs(w[..., 1]), 0
    return w


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 8])
def test_values_are_those_of_a_reference(bits, group):
    w = skewed((2, 32, 6))
    tree = {"decoder": {"blocks": {"q": {"kernel": jnp.asarray(w)}}}}
    node = flatten(quantize(tree, scheme=f"int{bits}", group=group, symmetric=False)[0])["decoder/blocks/q/kernel"]
    expected = np.stack([reference(part, bits, group or 32) for part in w])
    np.testing.assert_allclose(dense(node), expected, rtol=0, atol=1e-5)
    assert isinstance(node, Quantized if bits > 3 else Packed) and node.shape == w.shape
    groups = 32 // group if group else 1
    assert node.parts()["zero"].shape == (2, groups, 6) and node.parts()["zero"].dtype == f"int{max(bits, 4)}"
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    one = weights.layer_of(node, 1)
    np.testing.assert_allclose(weights.matmul(jnp.asarray(x), one, jnp.float32), x @ expected[1], rtol=1e-4, atol=1e-4)
    again = weights.assemble(weights.describe(node), weights.parts(node))
    np.testing.assert_array_equal(dense(again), dense(node))
    mask = np.random.default_rng(2).random(w.shape) < 0.5
    np.testing.assert_array_equal(dense(node.masked(mask)), np.where(mask, dense(node), 0))
    symmetric = flatten(quantize(tree, scheme=f"int{bits}", group=group)[0])["decoder/blocks/q/kernel"]
    lost = [np.linalg.norm(np.asarray(dense(a)) - w) for a in (node, symmetric)]
    assert lost[0] < 0.75 * lost[1]


@pytest.mark.parametrize("bits", [4, 2])
def test_the_model_runs_on_them_with_its_table(tiny, params, batches, bits):
    settings = {"scheme": f"int{bits}", "group": 8, "embeddings": True}
    got, errors = quantize(params, **settings, symmetric=False)
    table = flatten(got)["embed/tokens"]
    rows = np.array([[3, 0], [31, 3]])
    np.testing.assert_allclose(
        weights.take(table, jnp.asarray(rows), jnp.float32), np.asarray(dense(table))[rows], rtol=1e-6
    )
    np.testing.assert_allclose(dense(table), reference(np.asarray(params["embed"]["tokens"]).T, bits, 8).T, atol=1e-6)
    hidden = jax.jit(partial(functional.hidden, tiny))
    plain = jax.tree.map(dense, got, is_leaf=weights.is_weight)
    np.testing.assert_allclose(hidden(got, batches[0]), hidden(plain, batches[0]), atol=2e-5)
    assert max(errors.values()) < max(quantize(params, **settings)[1].values())
