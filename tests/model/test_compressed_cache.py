"""Keys and values in 8 and 4 bits: codes against numpy, attention against that of the dequantized, bytes by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.model import compressed_cache, flops, kv_cache
from llmctl.model.attention_xla import Keys, attend_to_parts
from llmctl.model.compressed_cache import Compressed
from llmctl.model.config import ModelConfig

B, T, S, H, G, K = 2, 3, 7, 4, 2, 6


def values(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotated(x):
    """The last axis multiplied by Hadamard matrices, by numpy alone."""
    blocks = {2: [[1, 1], [1, -1]]}
    for n in (4, 8, 16, 32, 64):
        blocks[n] = np.kron(blocks[2], blocks[n // 2])
    size = max(n for n in blocks if x.shape[-1] % n == 0)
    matrix = np.kron(np.eye(x.shape[-1] // size), blocks[size]) / size**0.5
    return (x @ matrix).astype(np.float32)


def dequantized(x, name):
    """The values that a format can represent, one scale per last axis, by numpy alone."""
    return rotated(rounded(rotated(x), name))


def rounded(x, name):
    bound = {"int8": 127.5, "fp8_e4m3": 448.0, "int4": 7.5}[name]
    scale = (np.abs(x).max(axis=-1, keepdims=True) / np.float32(bound)).astype(np.float32)
    unit = x / np.where(scale == 0, 1, scale)
    if name == "fp8_e4m3":
        return unit.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return np.clip(np.round(unit), 0.5 - bound, bound - 0.5) * scale


@pytest.mark.parametrize("name", compressed_cache.BOUNDS)
def test_stored_values_are_those_of_numpy_and_take_the_bytes_of_arithmetic(name):
    x = values(0, G, S, 64)
    x[0, 1] = 0
    kept = Compressed.of(jnp.asarray(x), name)
    apart = np.abs(kept.dense() - dequantized(x, name)).max(axis=-1) > 1e-5  # a number halfway between two levels
    assert apart.mean() < 0.2 and not apart[0, 1]
    np.testing.assert_allclose(kept.dense(), x, atol=0.6 if name == "int4" else 0.15 if name == "fp8_e4m3" else 0.04)
    assert kept.shape == x.shape
    cfg = ModelConfig(preset="llama-tiny", layers=1, kv_heads=G, heads=G, head_dim=64)
    assert 2 * (kept.codes.nbytes + kept.scale.nbytes) == S * flops.kv_cache(cfg, 4, name)
    keys = Compressed.of(jnp.asarray(x), name, jnp.zeros((1, G, 1, 64)))
    assert keys.center is not None
    stored = [*jax.tree.leaves(keys), *jax.tree.leaves(kept)]
    assert sum(a.nbytes for a in stored) == flops.cache_row(cfg, S, 4, name)
    assert flops.kv_cache(cfg, 4, name) == 2 * G * {"int8": 68, "fp8_e4m3": 68, "int4": 36}[name]


def test_two_integers_share_a_byte():
    kept = Compressed.of(compressed_cache.rotated(jnp.array([[7.5, -3.0, 1.0, -7.5]])), "int4")
    assert kept.codes.tolist() == [[7 | 1 << 4, (-3 & 15) | (-7 & 15) << 4]]
    assert compressed_cache.rotated(kept.dense()).tolist() == [[7, -3, 1, -7]]
    assert Compressed.zeros((2, 3, 4), "int4", jnp.bfloat16).codes.shape == (2, 3, 2)
    with pytest.raises(RequestError, match="two elements per byte, and heads have 5"):
        compressed_cache.check("int4", ModelConfig(preset="gpt2-tiny", head_dim=5))


@pytest.mark.parametrize("name", compressed_cache.BOUNDS)
def test_large_elements_in_bfloat16_stay_finite(name):
    x = jnp.asarray(values(1, 40, 8) * 1e30, jnp.bfloat16)
    found = Compressed.of(x, name).dense()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, x.astype(jnp.float32), atol=float(jnp.abs(x).max()) * 0.15)


@pytest.mark.parametrize("name", compressed_cache.BOUNDS)
def test_attention_is_that_of_the_dequantized_keys_and_values(name):
    cfg = ModelConfig(preset="llama-tiny", heads=H, kv_heads=G, head_dim=K, attn_softcap=20.0)
    q, k, v = values(2, B, T, H, K), 3 * values(3, B, S, G, K), values(4, B, S, G, K)
    mask = np.random.default_rng(5).random((B, T, S)) < 0.7
    mask[..., 0] = True
    bias = values(6, H, T, S)
    by_head = (Compressed.of(jnp.asarray(a).transpose(0, 2, 1, 3), name) for a in (k, v))
    got = jax.jit(lambda q, k, v: attend_to_parts(q, [Keys(k, v, mask, bias)], cfg))(q, *by_head)

    k, v = (np.repeat(dequantized(a, name), H // G, axis=2) for a in (k, v))
    scores = 20 * np.tanh(np.einsum("bthk,bshk->bhts", q, k) / K**0.5 / 20) + bias
    scores = np.where(mask[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    want = np.einsum("bhts,bshk->bthk", p / p.sum(axis=-1, keepdims=True), v)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_an_outlier_channel_costs_little():
    x = values(7, 50, 64)
    x[:, 5] += 30
    error = np.abs(Compressed.of(jnp.asarray(x), "int8").dense() - x).mean()
    assert error < 0.6 * np.abs(rounded(x, "int8") - x).mean()


def test_a_center_leaves_attention_unchanged_before_rounding():
    cfg = ModelConfig(preset="llama-tiny", heads=H, kv_heads=G, head_dim=K, attn_softcap=20.0)
    q, k, v = values(2, B, T, H, K), 3 + values(3, B, G, S, K), values(4, B, G, S, K)
    mask, bias = np.ones((B, T, S), bool), values(6, H, T, S)
    center, raw = rotated(values(8, B, G, 1, K)), np.random.default_rng(9).random((B, G, S, 1)) < 0.3
    turned = rotated(k)
    codes, scale = np.where(raw, turned, (turned - center) / 2), np.where(raw, -1, 2).astype(np.float32)
    exact = Compressed(*map(jnp.asarray, (codes, scale)), "int8", jnp.asarray(center))
    plain = Keys(jnp.asarray(k.swapaxes(1, 2)), jnp.asarray(v.swapaxes(1, 2)), mask, bias)
    prefix = Keys(jnp.asarray(values(10, B, S, G, K)), plain.v_BSGK, mask, None)
    want = attend_to_parts(q, [prefix, plain], cfg)
    np.testing.assert_allclose(attend_to_parts(q, [prefix, plain._replace(k_BSGK=exact)], cfg), want, atol=1e-5)
    np.testing.assert_allclose(exact.dense(), k, atol=1e-5)


@pytest.mark.parametrize("name", compressed_cache.BOUNDS)
def test_keys_with_a_large_mean_are_closer_with_a_center(name):
    x, mean = values(11, 30, 64), 4 * values(12, 64)
    x[1:] += mean
    x[2], x[3] = 0, mean
    center = jnp.asarray(rotated(mean[None]))
    plain, kept = Compressed.of(jnp.asarray(x), name), Compressed.of(jnp.asarray(x), name, center)
    assert (np.asarray(kept.scale)[[0, 2, 3, 4], 0] < 0).tolist() == [True, True, False, False]
    np.testing.assert_allclose(kept.dense()[2], 0, atol=1e-30)
    errors = [np.abs(a.dense() - x)[4:].mean() for a in (kept, plain)]
    assert errors[0] < (0.6 if name != "fp8_e4m3" else 0.7) * errors[1]


def test_center_is_the_mean_of_the_first_tokens_that_are_not_padding():
    new = values(13, 2, 40, G, 8)
    real = np.arange(40) >= np.array([[5], [30]])  # the second row has too few tokens
    mask = real[:, None, :] & real[:, :, None] & np.tri(40, dtype=bool)
    want = rotated(new[0, 5 : 5 + kv_cache.CENTER_TOKENS].mean(axis=0))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, new, slot):
            return kv_cache.remember(self, "k", new, slot, jnp.float32, mask[:, : new.shape[1]])

    cache = {"cache": {"past_k": Compressed.zeros((2, G, 64, 8), "int8", jnp.float32, centered=True)}}
    found, cache = Layer().apply(cache, new, 0, mutable="cache")
    np.testing.assert_allclose(found.center[0, :, 0], want, atol=1e-6)
    assert not found.center[1].any()
    np.testing.assert_allclose(found.dense()[:, :, :40], new.swapaxes(1, 2), atol=0.05)
    later, cache = Layer().apply(cache, new + 9, jnp.int32(20), mutable="cache")  # a longer conversation
    np.testing.assert_array_equal(later.center, found.center)
    wide = kv_cache.widened(cache["cache"], 5)["past_k"]
    assert wide.shape == (2, G, 69, 8) and wide.center.shape == (2, G, 1, 8)
    again, _ = Layer().apply(cache, new + 9, jnp.int32(0), mutable="cache")
    np.testing.assert_allclose(again.center[0, :, 0], rotated(new[0, 5:21].mean(axis=0) + 9), atol=1e-5)
