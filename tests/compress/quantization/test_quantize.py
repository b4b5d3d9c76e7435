"""Known quantization errors, which weights are taken, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llmctl.compress.quantization.quantize import quantize, relative_error
from llmctl.compress.quantization.schemes import SCHEMES
from llmctl.config.errors import RequestError
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.model.weights import LowRank, Quantized, dense, flatten, unflatten


def error(w, bits, group=0) -> float:
    return float(relative_error(w, SCHEMES[f"int{bits}"](w, -2, group)))


def test_by_hand():
    w = jnp.array([[7.5, 150.0], [-3.2, 20.0], [0.49, -10.0]])
    got = SCHEMES["int4"](w, -2, 0).array  # scales 7.5 / 7.5 and 150 / 7.5
    np.testing.assert_allclose(got.scale, [[1.0, 20.0]])
    np.testing.assert_array_equal(np.asarray(got.qvalue, np.int32), [[7, 7], [-3, 1], [0, 0]])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("group", [0, 8])
def test_error_is_at_most_half_a_scale(scheme, group):
    w = jax.random.normal(jax.random.key(0), (2, 32, 8))
    node = SCHEMES[scheme](w, -2, group)
    q = node.array
    assert q.qvalue.dtype == {"int8": jnp.int8, "int4": jnp.int4}[scheme]
    assert q.scale.shape == (2, 32 // group if group else 1, 8)
    half = np.repeat(q.scale, group or 32, axis=1) / 2
    rounding = 2 * np.finfo(np.float32).eps * np.abs(w)  # of the quotient and of the product
    assert np.all(np.abs(w - dense(node)) <= half + rounding)


def test_more_bits_and_smaller_groups_err_less():
    w = jax.random.normal(jax.random.key(0), (64, 32))
    spiked = w.at[::16].mul(20.0)  # outliers that stretch the scale of everything that shares it
    assert error(w, 8) < 0.1 * error(w, 4)
    body = np.arange(64) % 16 != 0
    rest = {g: float(jnp.linalg.norm((spiked - dense(SCHEMES["int4"](spiked, -2, g)))[body])) for g in (0, 4)}
    assert rest[4] < 0.6 * rest[0]
    assert error(spiked, 4, 4) < error(spiked, 4)


def test_zeros_stay_zeros_and_a_zero_weight_is_exact():
    w = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, (16, 8)), 1.3, 0.0)
    assert np.all(dense(SCHEMES["int4"](w, -2, 0))[w == 0] == 0)
    assert error(jnp.zeros((16, 8)), 8) == 0.0


def test_which_weights_are_taken(tiny, params):
    params = {**params, "head": {"out": {"kernel": jnp.ones((16, 2)), "bias": jnp.zeros(2)}}}
    blocks = {p for p in flatten(params) if "blocks" in p and p.endswith("kernel")}
    for embeddings, head, more in (
        (False, False, set()),
        (True, False, {"embed/tokens"}),
        (False, True, {"head/out/kernel"}),
    ):
        got, errors = quantize(params, scheme="int8", embeddings=embeddings, head=head)
        assert {p for p, w in flatten(got).items() if isinstance(w, Quantized)} == blocks | more == set(errors)
        assert all(0 <= e < 0.02 for e in errors.values())
    table = flatten(quantize(params, scheme="int8", embeddings=True)[0])["embed/tokens"]
    assert table.array.scale.shape == (32, 1)  # one a row


@pytest.mark.parametrize(("bits", "group", "activations", "tolerance"), [
    (8, 0, "", 0.02), (8, 8, "int8", 0.04), (4, 4, "", 0.25), (4, 0, "int8", 0.35),
])  # fmt: skip
def test_the_model_runs_on_integers(tiny, params, batches, bits, group, activations, tolerance):
    got, _ = quantize(params, scheme=f"int{bits}", group=group, embeddings=bits == 8, activations=activations)
    hidden = jax.jit(partial(functional.hidden, tiny))
    plain, quantized = (hidden(p, batches[0]) for p in (params, got))
    assert float(jnp.linalg.norm(plain - quantized) / jnp.linalg.norm(plain)) < tolerance


@pytest.mark.parametrize("group", [0, 8])
def test_products_of_8_bit_floats_against_numpy(group):
    """One scale per token, and per group of inputs; weights and activations are float8_e4m3fn."""
    rng, groups = np.random.default_rng(0), 4 if group else 1
    w, x = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 16), (2, 5, 32)))
    params = {"decoder": {"blocks": {"mlp": {"up": {"kernel": w[None]}}}}}
    got, _ = quantize(params, scheme="fp8_e4m3", group=group, activations="fp8_e4m3")
    (node,) = flatten(got).values()
    node = jax.tree.map(lambda a: a[0], node)
    parts = x.reshape(2, 5, groups, -1)
    scale = np.abs(parts).max(axis=-1, keepdims=True) / np.float32(448)
    rounded = (parts / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    want = rounded.reshape(x.shape) @ np.asarray(node.dense())
    np.testing.assert_allclose(jax.jit(lambda x, w: weights.matmul(x, w, jnp.float32))(x, node), want, atol=2e-5)
    with pytest.raises(RequestError, match="cannot quantize its activations to int8"):
        node.with_activations("int8")
    with pytest.raises(RequestError, match="cannot quantize its activations to fp8_e4m3"):
        quantize(params, scheme="int8", activations="fp8_e4m3")


def test_refusals(params):
    down = {"decoder": {"blocks": {"mlp": {"down": params["decoder"]["blocks"]["mlp"]["down"]}}}}
    with pytest.raises(RequestError, match=r"group 5 does not divide the 24 inputs of decoder/blocks/mlp/down/.* 4, 6"):
        quantize(down, scheme="int4", group=5)
    once, _ = quantize(params, scheme="int8")
    with pytest.raises(RequestError, match="quantized already"):
        quantize(once, scheme="int4")
    flat = flatten(params)
    path = "decoder/blocks/attn/q/kernel"
    flat[path] = LowRank(flat[path], jnp.ones((3, 16, 1)), jnp.ones((3, 1, 16)), 1.0)
    with pytest.raises(RequestError, match="merge"):
        quantize(unflatten(flat), scheme="int8")


def test_every_family_is_reached_through_the_tree():
    cfg = ModelConfig(architecture="encoder_decoder", encoder_layers=1, layers=1, d_model=8, heads=2, kv_heads=2,
                      head_dim=4, d_ff=8, vocab_size=16, gated=False, positions="relative", tied=False)  # fmt: skip
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    got, errors = quantize(params, scheme="int8", head=True, rules=(("encoder/*", "int4"),))
    kinds = {path: w.format_name for path, w in flatten(got).items() if isinstance(w, Quantized)}
    assert {kind for path, kind in kinds.items() if path.startswith("encoder/")} == {"int4"}
    assert {kind for path, kind in kinds.items() if not path.startswith("encoder/")} == {"int8"}
    assert {"encoder/blocks/attn/q/kernel", "decoder/blocks/cross/k/kernel", "lm_head/kernel"} <= set(errors)
    assert "decoder/relative_bias/table" not in errors
