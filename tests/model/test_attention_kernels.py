"""Splash attention (interpreted) versus plain XLA attention: packed documents, windows, soft caps, meshes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig
from llmctl.data import device_batches
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_kernels, functional
from llmctl.model.attention import share
from llmctl.model.attention_xla import attend
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "d_ff": 32, "vocab_size": 64}
T = 256


def config(**changes):
    return ModelConfig(**{"preset": "llama-tiny", **SIZES, **changes})


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    q, k, v, d_y = (rng.normal(size=(2, T, h, 16)).astype(np.float32) for h in (4, 2, 2, 4))
    segments = np.repeat([[1, 1, 2, 3], [1, 2, 2, 0]], T // 4, axis=1).astype(np.int32)
    return q, k, v, d_y * (segments > 0)[..., None, None], jnp.asarray(segments)  # nobody reads padding


CASES = {
    "causal": (True, {}, False),
    "mutual": (False, {}, False),
    "window": (True, {"window": 100}, True),
    "a global layer among windows": (True, {"window": 100, "window_every": 2}, False),
    "a local layer among windows": (True, {"window": 100, "window_every": 2}, True),
    "window both ways": (False, {"window": 50}, True),
    "capped and scaled": (True, {"attn_softcap": 5.0, "attn_scale": 0.5}, False),
}


@pytest.mark.parametrize("causal, changes, local", CASES.values(), ids=CASES)
def test_splash_is_the_plain_form(operands, causal, changes, local):
    q, k, v, d_y, segments = operands
    cfg = config(**changes)
    shared = share(cfg, segments, jnp.zeros_like(segments), causal=causal)
    mask = shared.local_mask_BTS if local else shared.mask_BTS

    def plain(q, k, v):
        return attend(q, k, v, mask, None, cfg)

    def splash(q, k, v):
        return attention_kernels.splash(q, k, v, segments, jnp.asarray(local), cfg, causal=causal)

    def both_ways(form):
        @jax.jit
        def run(q, k, v, d_y):
            y, pull = jax.vjp(form, q, k, v)
            return jnp.where((segments > 0)[..., None, None], y, 0), *pull(d_y)

        return run(q, k, v, d_y)

    with attention_kernels.use("interpret"):
        got = both_ways(splash)
    for a, b in zip(got, both_ways(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-6)


def test_a_model_on_a_mesh_attends_the_same():
    cfg = config(window=100, window_every=2)
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, 64, (4, T)).astype(np.int32)
    positions = np.arange(T, dtype=np.int32) * np.ones_like(tokens)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}
    plain = jax.jit(lambda p, b: functional.hidden(cfg, p, b))(params, batch)
    with meshes.use(mesh), attention_kernels.use("interpret"):
        assert attention_kernels.describe(cfg, T, "float32") == "attention: splash (Pallas, interpreted)"
        placed = jax.device_put(params, functional.shardings(cfg, params, mesh))
        fused = jax.jit(lambda p, b: functional.hidden(cfg, p, b))
        lowered = fused.lower(placed, device_batches.place(batch, mesh))
        got = lowered.compile()(placed, device_batches.place(batch, mesh))
    np.testing.assert_allclose(got, plain, atol=1e-4)


def gpu(capability="9.0"):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    return SimpleNamespace(devices=np.asarray([device], object), shape=dict.fromkeys(meshes.AXES, 1))


@pytest.mark.parametrize(
    "changes, length, dtype, capability, kernel, why",
    [
        ({}, 256, "bfloat16", "9.0", "cudnn", "on GPU"),
        ({}, 256, "float32", "9.0", "xla", "float32"),
        ({"attn_softcap": 5.0}, 256, "bfloat16", "9.0", "xla", "capped"),
        ({"head_dim": 256}, 256, "bfloat16", "8.0", "xla", "256 wide"),
        ({"head_dim": 256}, 256, "bfloat16", "9.0", "cudnn", "on GPU"),
        ({}, 255, "bfloat16", "9.0", "xla", "odd"),
        ({}, 256, "bfloat16", "7.5", "xla", "older"),
    ],
)
def test_the_choice_on_a_gpu(monkeypatch, changes, length, dtype, capability, kernel, why):
    monkeypatch.setattr(attention_kernels, "_has_cudnn", lambda: True)
    monkeypatch.setattr(meshes, "current", lambda: gpu(capability))
    found = attention_kernels.choose(config(**changes), length, dtype)
    assert found.kernel == kernel and why in found.why


def test_the_choice_elsewhere():
    assert attention_kernels.choose(config(), 256, "bfloat16") == ("xla", "on cpu, large scores in blocks")
    assert not attention_kernels._has_cudnn()
    with attention_kernels.use("xla"):
        assert attention_kernels.describe(config(), 256, "float32") == "attention: xla (as asked for)"
    with attention_kernels.use("interpret"):
        assert attention_kernels.choose(config(), 200, "float32").why == "200 tokens are no multiple of 128"
        relative = ModelConfig(preset="t5-tiny")
        assert attention_kernels.choose(relative, 256, "float32").kernel == "xla"


def test_cudnn_is_asked_for_what_the_plain_form_computes(operands, monkeypatch):
    """cuDNN itself needs a GPU; here its call runs by XLA with the same arguments."""
    q, k, v, _, segments = operands
    cfg = config(attn_scale=0.5)
    real, asked = jax.nn.dot_product_attention, []

    def instead(*args, implementation, **kwargs):
        asked.append(implementation)
        return real(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    mask = share(cfg, segments, jnp.zeros_like(segments), causal=True).mask_BTS
    got, want = attention_kernels.cudnn(q, k, v, mask, cfg), attend(q, k, v, mask, None, cfg)
    real_rows = np.asarray(segments > 0)
    np.testing.assert_allclose(np.asarray(got)[real_rows], np.asarray(want)[real_rows], atol=1e-5)
    assert asked == ["cudnn"]
