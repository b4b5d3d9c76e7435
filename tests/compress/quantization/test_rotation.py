"""Rotations leave the function as it is, spread outliers, and are refused for models that they would change."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.quantization import rotation
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

SIZES = {"vocab_size": 32, "d_model": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "d_ff": 24}
MODELS = {
    "tied": {"family": "llama", **SIZES},
    "untied, with biases and heads norms": {
        "family": "llama", **SIZES, "tied": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        "qk_norm": True,
    },
    "norms of 1 + scale and learned positions": {
        "family": "llama", **SIZES, "norm_plus_one": True, "positions": "learned", "max_seq_len": 16,
        "embed_scale": 0.0,
    },
    "bottleneck adapters": {"family": "llama", **SIZES, "adapter_size": 4},
    "parallel adapters": {"family": "llama", **SIZES, "adapter_size": 4, "adapter_form": "parallel"},
    "encoder-decoder": {
        "family": "t5", **SIZES, "architecture": "encoder_decoder", "encoder_layers": 2, "logit_scale": 0.0,
    },
    "encoder with classes": {
        "family": "llama", **SIZES, "architecture": "encoder", "head": "classify", "labels": 3, "pooling": "mean",
    },
}  # fmt: skip


def random(cfg, seed=0):
    """Return parameters without zeros, and norms whose scales differ."""
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape).astype(a.dtype), params)


@pytest.mark.parametrize("name", MODELS)
def test_the_function_does_not_change(name, make_rows):
    cfg = ModelConfig.model_validate(MODELS[name])
    params, batch = random(cfg), make_rows(cfg, 0)
    rotation.check(cfg, params, False)
    turned, new = rotation.rotated(cfg, params, 3), rotation.untied(cfg)

    def outputs(cfg, params):
        hidden = functional.hidden(cfg, params, batch)
        if cfg.head_kind.vocabulary:
            return functional.lm_logits(cfg, params, hidden, jnp.float32)
        return functional.outputs(cfg, params, hidden, batch, jnp.float32)

    with jax.default_matmul_precision("highest"):
        before, after = (np.asarray(jax.jit(partial(outputs, c))(p)) for c, p in ((cfg, params), (new, turned)))
    assert jax.tree.structure(turned) == jax.tree.structure(functional.abstract(new))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    q, first = (weights.flatten(p)["embed/tokens"] for p in (turned, params))
    assert np.abs(q - first).max() > 0.1


@pytest.mark.parametrize("size", [16, 12, 7])
def test_rotations_are_orthogonal(size):
    matrix = rotation.orthogonal(size, 1)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    assert not np.array_equal(matrix, rotation.orthogonal(size, 2))


def test_quantized_activations_err_less_if_channels_have_outliers(make_rows):
    """Two channels of the residual stream are 40 times as large as the others, and the matrices read them as little."""
    cfg = ModelConfig.model_validate({**MODELS["tied"], "d_model": 64, "tied": False})
    flat = weights.flatten(jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(1)))
    flat["embed/tokens"] = flat["embed/tokens"].at[:, 5:7].mul(40.0)
    for path in ("lm_head", *(f"decoder/blocks/{m}" for m in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"))):
        path = f"{path}/kernel"
        flat[path] = flat[path].at[..., 5:7, :].divide(40.0)
    params, batch = weights.unflatten(flat), make_rows(cfg, 0)
    hidden = jax.jit(partial(functional.hidden, cfg))
    logits = jax.jit(lambda p: functional.lm_logits(cfg, p, hidden(p, batch), jnp.float32))
    errors = []
    for given in (params, rotation.rotated(cfg, params, 0)):
        exact = logits(given)
        got = logits(quantize(given, scheme="int8", activations="int8")[0])
        errors.append(float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"family": "gpt2", "norm": "layer"}, "its layer norms subtract the mean"),
    ({"norm_position": "sandwich"}, "its norms scale single channels of the residual stream"),
    ({"positions": "sinusoidal"}, "its sinusoidal positions"),
    ({"embed_norm": True}, "its embedding norm scales single channels"),
    ({"head": "embed", "architecture": "encoder"}, "its output is the hidden state"),
])  # fmt: skip
def test_refusals(changes, message):
    cfg = ModelConfig.model_validate({**MODELS["tied"], **changes})
    with pytest.raises(RequestError, match=f"rotate: the model cannot be rotated: {message}.*; leave out rotate"):
        rotation.check(cfg, {}, False)


def test_pruned_and_quantized_models_are_refused(tiny, params):
    with pytest.raises(RequestError, match="its zeros would be filled"):
        rotation.check(tiny, params, True)
    with pytest.raises(RequestError, match="quantized already"):
        rotation.check(tiny, quantize(params, scheme="int8")[0], False)
