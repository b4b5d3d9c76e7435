"""Codes and scales of the packed formats equal those of ml_dtypes, and bytes are those of arithmetic."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llmctl.compress.quantization import quantize
from llmctl.compress.quantization.grids import GRIDS
from llmctl.compress.quantization.schemes import SCHEMES, inputs_per_scale
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.weights import packed

NAMES = [*packed.BITS]


def random_levels(name, shape):
    codes = np.random.default_rng(0).integers(0, 2 ** packed.BITS[name], shape, dtype=np.uint8)
    return codes, packed.levels(name, jnp.asarray(codes))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_codes_of_floats_are_those_of_ml_dtypes(name):
    codes, level = random_levels(name, (64, 8))
    np.testing.assert_array_equal(level, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    ties = np.arange(-28, 29) / 4  # all midpoints
    unit = np.concatenate([np.random.default_rng(1).normal(0, 3, 4000), ties, [-0.0, -0.1, 1e9]]).astype(np.float32)
    got = packed.codes(name, GRIDS[name].nearest(jnp.asarray(unit)))
    np.testing.assert_array_equal(got, unit.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_8_bit_floats_are_those_of_ml_dtypes(name, dtype):
    own = getattr(ml_dtypes, dtype)
    every = np.arange(256, dtype=np.uint8).view(own).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    halves = (every[1:] + every[:-1]) / 2
    unit = np.concatenate([every, halves, np.nextafter(halves, np.float32(9)), np.nextafter(halves, np.float32(-9))])
    got = jax.jit(GRIDS[name].nearest)(jnp.asarray(unit))
    np.testing.assert_array_equal(got, unit.astype(own).astype(np.float32))
    w = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    node = SCHEMES[name](jnp.asarray(w), -2, 0)
    scale = np.abs(w).max(axis=0) / np.float32(ml_dtypes.finfo(own).max)
    np.testing.assert_array_equal(np.asarray(node.array.qvalue), (w / np.asarray(node.array.scale)).astype(own))
    np.testing.assert_allclose(node.array.scale[0], scale, rtol=1e-6)


def test_scales_of_mxfp4_are_powers_of_two():
    w = jnp.zeros((128, 1)).at[::32, 0].set(jnp.array([0.9, -7.9, 0.01, 0.0]))
    node = SCHEMES["mxfp4"](w, -2, 32)
    assert node.scale[:, 0].tolist() == [124, 127, 118, 127]  # 2^(floor(log2 w) - 2)
    assert np.asarray(node.scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:2, 0].tolist() == [0.125, 1.0]
    np.testing.assert_allclose(node.dense()[::32, 0], [0.75, -6.0, 3 * 2.0**-9 * 2, 0.0], rtol=0.2)


def test_scales_of_nvfp4_are_those_of_ml_dtypes():
    w = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    node = SCHEMES["nvfp4"](jnp.asarray(w), -2, 0)
    whole = np.abs(w).max() / np.float32(6 * 448)
    np.testing.assert_allclose(node.whole, [[whole]], rtol=1e-6)
    highest = np.abs(w.reshape(2, 16, 6)).max(axis=1)
    np.testing.assert_array_equal(node.scale, (highest / 6 / np.asarray(node.whole)).astype(ml_dtypes.float8_e4m3fn))
    scale = np.repeat(np.asarray(node.scale).astype(np.float32) * np.asarray(node.whole), 16, axis=0)
    expected = (w / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    np.testing.assert_array_equal(node.dense(), expected)


@pytest.mark.parametrize("bits", packed.PER_WORD)
@pytest.mark.parametrize("axis", [0, -1])
def test_packing_is_undone(bits, axis):
    codes = np.random.default_rng(0).integers(0, 2**bits, (13, 5, 11), dtype=np.uint8)
    stored = packed.pack(jnp.asarray(codes), bits, axis)
    np.testing.assert_array_equal(packed.unpack(stored, bits, codes.shape[axis], axis), codes)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_arithmetic(name):
    shape, group = (2, 256, 64), inputs_per_scale(name, 0) or 128
    node = SCHEMES[name](jax.random.normal(jax.random.key(0), shape), -2, group)
    scale_bits = 8 if name.endswith("fp4") else 32
    per_weight = packed.BITS[name] + scale_bits / group
    assert bytes_of(node) == pytest.approx(np.prod(shape) * per_weight / 8, rel=0.02)
    assert node.shape == shape and node.count() == np.prod(shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_node_is_a_matrix_or_a_table(name):
    w = jax.random.normal(jax.random.key(0), (32, 48))
    group = inputs_per_scale(name, 0) or 16
    node, table = SCHEMES[name](w, -2, group), SCHEMES[name](w.T, -1, group)
    np.testing.assert_array_equal(table.dense(), node.dense().T)
    ids = jnp.array([[3, 0], [7, 7]])
    np.testing.assert_array_equal(weights.take(table, ids, jnp.float32), table.dense()[ids])
    x = jax.random.normal(jax.random.key(1), (3, 32))
    np.testing.assert_allclose(weights.matmul(x, node, jnp.float32), x @ node.dense(), rtol=1e-5, atol=1e-5)
    again = weights.assemble(weights.describe(table), weights.parts(table))
    np.testing.assert_array_equal(again.dense(), table.dense())
    assert again.shape == (48, 32)
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, w.shape)
    np.testing.assert_array_equal(node.masked(mask).dense(), jnp.where(mask, node.dense(), 0.0))


def test_inputs_are_not_selected_from_bytes():
    node = SCHEMES["int3"](jnp.full((2, 16, 8), 3.5), -2, 0)
    index = np.array([[0, 5], [1, 2]])
    np.testing.assert_array_equal(node.select(index, -1).dense(), jnp.full((2, 16, 2), 3.0))
    with pytest.raises(RequestError, match="is packed int3 along what would be cut"):
        node.select(index, -2)


@pytest.mark.parametrize("name", SCHEMES.own)
def test_messages_name_the_format(name):
    w = jnp.ones((64, 2))
    node = SCHEMES[name](w, -2, inputs_per_scale(name, 0))
    said = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(name, name)
    with pytest.raises(RequestError, match=rf"^up/kernel is quantized already \({said}\)"):
        quantize.check("up/kernel", node, -2, "int8", 0)


def test_a_format_with_its_own_blocks_offers_no_other_group():
    with pytest.raises(RequestError, match="mxfp4 has one scale per 32 inputs, which does not divide the 48 inputs"):
        quantize.check("up/kernel", jnp.ones((48, 2)), -2, "mxfp4", 32)
    with pytest.raises(RequestError, match="groups near it that do: 12, 16, 24, 48"):
        quantize.check("up/kernel", jnp.ones((48, 2)), -2, "int4", 32)
