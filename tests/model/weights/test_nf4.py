"""NF4: levels, bounds and codes are the published ones, and the node is a weight like others."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import fingerprint
from llmctl.compress.quantization.quantize import quantize, relative_error
from llmctl.compress.quantization.schemes import SCHEMES
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import NormalFloat
from llmctl.model.weights.nf4 import BOUNDS, LEVELS, OFFSET

THRESHOLDS = (  # of the quantization kernel of bitsandbytes, from the lowest to the highest
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
    *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
    *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(w_IO, block):
    """Codes and scales, by the distance to every level."""
    blocks = w_IO.reshape(-1, block, w_IO.shape[1])
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    unit = blocks * (np.float32(1) / np.where(scale == 0, np.float32(1), scale))
    codes = np.abs(unit[..., None].astype(np.float64) - LEVELS).argmin(-1)
    return codes.reshape(w_IO.shape), scale[:, 0]


def test_levels_are_quantiles_of_the_normal_distribution():
    """As in the authors' code: eight levels of the upper half, seven of the lower, and zero."""
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    upper = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    found = np.sort([*upper, 0.0, *lower])
    np.testing.assert_allclose(LEVELS, found / found.max(), atol=1e-6)
    np.testing.assert_array_equal(BOUNDS, np.array(THRESHOLDS, np.float32))


@pytest.mark.parametrize("block", [64, 16])
def test_codes_are_those_of_the_nearest_levels(block):
    w = normal(128, 12)
    w[:block, 3] = 0  # a block of zeros
    w[block, 4] = 0
    node = SCHEMES["nf4"](jnp.asarray(w), -2, block)
    codes, scale = reference(w, block)
    np.testing.assert_array_equal(np.asarray(node.codes, np.int32) + OFFSET, codes)
    np.testing.assert_array_equal(node.scale, scale)
    expected = LEVELS[codes] * np.repeat(scale, block, axis=0)
    np.testing.assert_array_equal(node.dense(), expected)
    assert not node.dense()[w == 0].any()
    ties = jnp.concatenate([jnp.asarray(BOUNDS), jnp.ones(1)])[:, None]
    np.testing.assert_array_equal(np.asarray(NormalFloat.of(ties, 0, 16).codes, np.int32)[:15, 0] + OFFSET, range(15))
    assert node.codes.dtype == jnp.int4 and node.is_integer and node.shape == (128, 12)


def test_it_errs_less_than_int4_on_normal_weights():
    w = jnp.asarray(normal(256, 32))
    errors = {name: float(relative_error(w, SCHEMES[name](w, -2, 64))) for name in ("nf4", "int4")}
    assert errors["nf4"] < 0.95 * errors["int4"] and errors["nf4"] < 0.1


def test_products_rows_masks_and_parts():
    w, x = normal(2, 64, 8), normal(3, 64, seed=1)
    node = SCHEMES["nf4"](jnp.asarray(w), -2, 0)
    assert node.scale.shape == (2, 1, 8)
    layer = weights.layer_of({"w": node}, 1)["w"]
    np.testing.assert_allclose(weights.matmul(x, layer, jnp.float32), x @ np.asarray(layer.dense()), rtol=1e-5)
    table = SCHEMES["nf4"](jnp.asarray(normal(10, 128, seed=2)), -1, 0)
    assert table.scale.shape == (10, 2)
    ids = jnp.array([[3, 3], [9, 0]])
    np.testing.assert_array_equal(weights.take(table, ids, jnp.float32), np.asarray(table.dense())[np.asarray(ids)])
    mask = np.random.default_rng(3).random((2, 64, 8)) < 0.5
    np.testing.assert_array_equal(node.masked(jnp.asarray(mask)).dense(), np.asarray(node.dense()) * mask)
    kept = node.select(np.array([[0, 2], [5, 7]]), -1)
    np.testing.assert_array_equal(kept.dense()[1], np.asarray(node.dense())[1][:, [5, 7]])
    with pytest.raises(RequestError, match="is quantized in groups of 64"):
        SCHEMES["nf4"](jnp.asarray(normal(2, 128, 8)), -2, 0).select(np.array([[0, 2], [5, 7]]), -2)
    again = weights.assemble(weights.describe(node), weights.parts(node))
    jax.tree.map(np.testing.assert_array_equal, again, node)
    assert node.for_decoding(on_cpu=False) is node
    np.testing.assert_array_equal(node.for_decoding(on_cpu=True), node.dense())


def test_size_and_refusals():
    params = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.asarray(normal(2, 128, 64))}}}}}
    small, _ = quantize(params, scheme="nf4")
    fields = fingerprint.manifest_fields(weights.flatten(small))
    assert fields["bits"] == 4 + 32 / 64 and fields["parameters"] == 2 * 128 * 64
    with pytest.raises(RequestError, match=r"q/kernel is quantized already \(nf4\)"):
        quantize(small, scheme="int8")
    with pytest.raises(RequestError, match="nf4 weight cannot quantize its activations to int8"):
        quantize(params, scheme="nf4", activations="int8")
    odd = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.asarray(normal(2, 96, 64))}}}}}
    with pytest.raises(RequestError, match=r"group 64 does not divide the 96 inputs of .*: 24, 32, 48, 96"):
        quantize(odd, scheme="nf4")
