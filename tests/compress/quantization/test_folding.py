"""Scales that are moved into producers change no output; AWQ and SmoothQuant choose scales that lower the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.quantization import folding, grids, input_scales
from llmctl.compress.quantization.grids import GRIDS
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

SIZES = {"vocab_size": 32, "d_model": 16, "layers": 1, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 24,
         "max_seq_len": 16}  # fmt: skip


@pytest.mark.parametrize(("flags", "producers"), [
    ({"family": "llama", "kv_heads": 2}, ["attn_norm", "attn/v", "mlp_norm", "mlp/up"]),
    ({"family": "gemma2", "kv_heads": 2}, ["attn_norm", "attn/v", "mlp_norm", "mlp/up"]),
    ({"family": "gpt2"}, ["attn_norm", "attn/v", "mlp_norm"]),
    ({"family": "bert"}, ["attn/v"]),
    ({"family": "t5", "encoder_layers": 1}, ["attn_norm", "attn/v", "cross_norm", "cross/v", "mlp_norm", "mlp/up"]),
], ids=str)  # fmt: skip
def test_outputs_do_not_change(flags, producers):
    cfg = ModelConfig.model_validate({**SIZES, **flags})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    stack = functional.stacks(cfg)[-1]
    layer, places = weights.layer_of(params[stack]["blocks"], 0), folding.folds(cfg, stack)
    assert [at.producer for at in places] == producers
    moved = layer
    for i, at in enumerate(places):
        inputs = weights.flatten(layer)[weights.kernel_of(at.readers[0])].shape[0]
        scale_I = at.shared(jnp.exp(jax.random.normal(jax.random.key(i), (inputs,))), jnp.max)
        moved = folding.fold(cfg, moved, at, scale_I)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 8), dtype=np.int32)
    batch = {"tokens": tokens, "segments": np.ones((2, 8), np.int32), "positions": np.tile(np.arange(8), (2, 1))}
    if cfg.encoder_layers:
        batch |= {f"encoder_{name}": a for name, a in batch.items()}
    run = jax.jit(lambda layer: functional.hidden(cfg, {**params, stack: {**params[stack], "blocks": layer}}, batch))
    before, after = (run(jax.tree.map(lambda a: a[None], one)) for one in (layer, moved))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))


def inputs_with_outliers(seed=0, tokens=400, inputs=32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + 0.2 * rng.normal(size=(inputs, inputs)))
    x[:, :3] *= 30
    return x.astype(np.float32), rng.normal(size=(inputs, 16)).astype(np.float32)


ALONE = folding.Fold("norm", ("up",), 1, 1)


def test_awq_equals_a_search_by_hand_and_lowers_the_error():
    x, w = inputs_with_outliers()
    gram, size = x.T @ x, np.sqrt(np.mean(np.square(x), axis=0))

    def error(exponent):
        scale = size**exponent
        scale = (scale / np.sqrt(scale.max() * scale.min()))[:, None]
        step = np.abs(w * scale).max(axis=0) / 7.5
        return np.linalg.norm(x @ (np.clip(np.round(w * scale / step), -7, 7) * step / scale - w))

    errors = [error(i / 20) for i in range(21)]
    scale_I, exponent = input_scales.awq((jnp.asarray(w),), gram, at=ALONE, levels=((GRIDS["int4"], 0),))
    assert float(exponent) == pytest.approx(np.argmin(errors) / 20, abs=1e-6) and min(errors) < 0.85 * errors[0]
    expected = size ** float(exponent)
    np.testing.assert_allclose(scale_I, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-4)


def test_smoothing_lowers_the_error_of_integer_products():
    x, w = inputs_with_outliers()
    scale_I = input_scales.smooth((jnp.asarray(w),), jnp.abs(x).max(axis=0), 0.5, at=ALONE)
    np.testing.assert_allclose(scale_I, np.sqrt(np.abs(x).max(axis=0) / np.abs(w).max(axis=1)), rtol=1e-5)

    def error(x, w):
        node = grids.rounded(w, None, grid=GRIDS["int8"], group=0, clip=False).with_activations("int8")
        return float(jnp.linalg.norm(weights.matmul(jnp.asarray(x), node, jnp.float32) - x @ w))

    assert error(x / scale_I, w * scale_I[:, None]) < 0.7 * error(x, w)


def test_inputs_that_are_always_zero_keep_their_scale():
    x, w = inputs_with_outliers()
    x[:, 5] = 0
    scale_I, _ = input_scales.awq((jnp.asarray(w),), x.T @ x, at=ALONE, levels=((GRIDS["int4"], 8),))
    smoothed_I = input_scales.smooth((jnp.asarray(w),), jnp.abs(x).max(axis=0), 0.5, at=ALONE)
    assert scale_I[5] == smoothed_I[5] == 1 and np.isfinite(scale_I).all()


def test_heads_that_share_a_value_head_share_scales():
    at = folding.Fold("attn/v", ("attn/o",), 2, 3)
    assert at.shared(jnp.arange(12.0), jnp.max).tolist() == [4, 5, 4, 5, 4, 5, 10, 11, 10, 11, 10, 11]
