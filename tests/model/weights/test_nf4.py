"""NF4: levels, bounds and codes are the published ones, and the node is a weight like others."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import fingerprint
from llmctl.compress.quantization import grids
from llmctl.compress.quantization.levels import NormalFloats
from llmctl.compress.quantization.quantize import quantize, relative_error
from llmctl.compress.quantization.schemes import SCHEMES
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import NormalFloat
from llmctl.model.weights.nf4 import BOUNDS, LEVELS, OFFSET, SCALE_LEVELS, ZERO

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


def test_levels_of_scales_are_the_signed_dynamic_map():
    """Decade by decade: 64 levels from 0.1 to 1, half as many in each decade below, their mirror images, 0 and 1."""
    positive = SCALE_LEVELS[128:-1].astype(np.float64)
    steps = [9 / 640 * 2**i / 10**i for i in range(7)]  # widths of the intervals whose midpoints are levels
    expected = [0.1 ** (i + 1) + steps[i] * (j + 0.5) for i in range(6, -1, -1) for j in range(2 ** (6 - i))]
    np.testing.assert_allclose(positive, expected, rtol=1e-6)
    np.testing.assert_array_equal(SCALE_LEVELS[:127], -SCALE_LEVELS[254:127:-1])
    assert SCALE_LEVELS[127] == 0 and SCALE_LEVELS[255] == 1 and len(SCALE_LEVELS) == 256
    gaps = np.diff([-1.0, *SCALE_LEVELS.astype(np.float64)])
    assert gaps[1:].max() / 2 <= 0.9 / 128 + 1e-7 and gaps[0] <= 0.9 / 128 + 1e-7


def double_reference(scale_GO):
    """Codes and values of scales, by the distance to every level, for groups of 256 outputs."""
    mean = scale_GO.mean(dtype=np.float64).astype(np.float32)
    codes, values, bounds = np.empty(scale_GO.shape, int), np.empty(scale_GO.shape), np.empty(scale_GO.shape)
    for start in range(0, scale_GO.shape[1], 256):
        group = slice(start, start + 256)
        rest = scale_GO[:, group] - mean
        most = np.abs(rest).max(axis=1, keepdims=True)
        codes[:, group] = np.abs((rest / most)[..., None].astype(np.float64) - SCALE_LEVELS).argmin(-1)
        values[:, group] = np.maximum(mean + SCALE_LEVELS[codes[:, group]] * most.astype(np.float64), 0)
        bounds[:, group] = most * 0.9 / 128
    return codes, values, bounds


def test_scales_are_quantized_as_in_a_plain_reference():
    """300 outputs: a group of 256 scales, and a group of 44."""
    w = normal(2, 128, 300) * np.exp(normal(300, seed=4) / 2)
    w[0, :64, 5] = 0  # a block of zeros
    plain = SCHEMES["nf4"](jnp.asarray(w), -2, 0)
    node = plain.double_quantized()
    np.testing.assert_array_equal(node.codes, plain.codes)
    assert node.scale.dtype == jnp.uint8 and node.scale_max.shape == (2, 2, 2) and node.scale_mean.shape == (2, 1, 1)
    for layer in range(2):
        codes, values, bounds = double_reference(np.asarray(plain.scale)[layer])
        np.testing.assert_array_equal(np.asarray(node.scale, int)[layer], codes)
        np.testing.assert_allclose(node.scales()[layer], values, rtol=1e-6, atol=1e-6)
        assert (np.abs(np.asarray(node.scales())[layer] - np.asarray(plain.scale)[layer]) <= bounds * 1.0001).all()
        expected = LEVELS[np.asarray(node.codes, int)[layer] + OFFSET] * np.repeat(values, 64, axis=0)
        np.testing.assert_allclose(node.dense()[layer], expected, rtol=1e-6, atol=1e-6)
    assert not node.dense()[w == 0].any() and node.dtype == jnp.float32
    grid = NormalFloats(double_quantize=True)
    for clipped in (False, True):  # grids store a block of zeros with the scale 0, as schemes do
        found = grids.quantized(jnp.asarray(w), grid, -2, 64, clipped)
        single = grids.quantized(jnp.asarray(w), NormalFloats(), -2, 64, clipped)
        np.testing.assert_array_equal(found.codes, single.codes)
        if not clipped:
            np.testing.assert_array_equal(found.scale, node.scale)
            np.testing.assert_allclose(found.scale_mean, node.scale_mean, rtol=1e-6)
        assert (np.asarray(found.scales())[0, 0, 5] < 0.02) and (found.codes[0, :64, 5] == ZERO).all()


def test_double_quantized_weights_are_weights_like_others():
    w, x = normal(2, 64, 300), normal(3, 64, seed=1)
    node = SCHEMES["nf4"](jnp.asarray(w), -2, 0).double_quantized()
    layer = weights.layer_of({"w": node}, 1)["w"]
    np.testing.assert_allclose(weights.matmul(x, layer, jnp.float32), x @ np.asarray(layer.dense()), rtol=1e-4)
    np.testing.assert_array_equal(layer.dense(), node.dense()[1])
    table = grids.quantized(jnp.asarray(normal(300, 128, seed=2)), NormalFloats(double_quantize=True), -1, 64, False)
    assert table.scale.shape == (300, 2) and table.scale_max.shape == (2, 2)
    ids = jnp.array([[3, 255], [256, 299]])
    np.testing.assert_array_equal(weights.take(table, ids, jnp.float32), np.asarray(table.dense())[np.asarray(ids)])
    np.testing.assert_array_equal(weights.take(table, jnp.int32(257), jnp.float32), table.dense()[257])
    mask = np.random.default_rng(3).random(w.shape) < 0.5
    np.testing.assert_array_equal(node.masked(jnp.asarray(mask)).dense(), np.asarray(node.dense()) * mask)
    outputs = np.array([[0, 299], [5, 256]])
    kept = node.select(outputs, -1)  # the groups of 256 scales are broken up
    assert kept.scale.dtype == jnp.float32 and kept.scale_max is None
    for i in range(2):
        np.testing.assert_array_equal(kept.dense()[i], np.asarray(node.dense())[i][:, outputs[i]])
    kept = node.select(np.array([[0, 2], [5, 7]]), -2)
    np.testing.assert_array_equal(kept.dense()[1], np.asarray(node.dense())[1][[5, 7]])
    assert not node.misfit() and not table.misfit() and not layer.misfit()
    again = weights.assemble(weights.describe(node), weights.parts(node))
    jax.tree.map(np.testing.assert_array_equal, again, node)
    for part, wrong in (("scale_max", node.scale_max[..., :1]), ("scale_mean", node.scale_mean[..., 0]),
                        ("scale", node.scales())):  # fmt: skip
        assert weights.assemble(weights.describe(node), {**node.parts(), part: wrong}).misfit() == part


@pytest.mark.parametrize("double", [False, True])
def test_size_and_refusals(double):
    params = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.asarray(normal(2, 128, 64))}}}}}
    small, _ = quantize(params, scheme="nf4", double_quantize=double)
    fields = fingerprint.manifest_fields(weights.flatten(small))
    scales = 8 / 64 + 32 / (64 * 64) + 32 / (128 * 64) if double else 32 / 64  # groups have 64 outputs, of up to 256
    assert fields["bits"] == 4 + scales and fields["parameters"] == 2 * 128 * 64
    with pytest.raises(RequestError, match=r"q/kernel is quantized already \(nf4\)"):
        quantize(small, scheme="int8")
    with pytest.raises(RequestError, match="nf4 weight cannot quantize its activations to int8"):
        quantize(params, scheme="nf4", activations="int8")
    odd = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.asarray(normal(2, 96, 64))}}}}}
    with pytest.raises(RequestError, match=r"group 64 does not divide the 96 inputs of .*: 24, 32, 48, 96"):
        quantize(odd, scheme="nf4")
