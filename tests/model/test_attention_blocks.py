"""Attention in blocks of scores versus plain XLA attention: outputs, gradients, and the choice of the block sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_blocks, attention_kernels, attention_xla
from llmctl.model.attention import Shared, share
from llmctl.model.config import ModelConfig

T = 160  # not a multiple of the block
CASES = {
    "causal, packed, grouped": (True, False, {}),
    "bidirectional with a bias": (False, True, {}),
    "causal with a bias": (True, True, {}),
    "a window and a soft cap": (True, False, {"window": 50, "attn_softcap": 5.0, "attn_scale": 0.5}),
}


@pytest.mark.parametrize("causal, biased, changes", CASES.values(), ids=CASES)
def test_blocks_equal_the_whole(causal, biased, changes):
    rng = np.random.default_rng(0)
    q, k, v, d_y = (rng.normal(size=(2, T, h, 8)).astype(np.float32) for h in (4, 2, 2, 4))
    segments = np.repeat([[1, 1, 2, 3], [1, 2, 2, 0]], T // 4, axis=1).astype(np.int32)
    d_y *= (segments > 0)[..., None, None]  # the outputs of padding are never used
    bias = rng.normal(size=(4, T, T)).astype(np.float32) if biased else None
    cfg = ModelConfig(preset="llama-tiny", d_model=32, heads=4, kv_heads=2, head_dim=8, **changes)
    shared = share(cfg, jnp.asarray(segments), jnp.zeros_like(segments), causal=causal)
    mask = shared.local_mask_BTS if "window" in changes else shared.mask_BTS

    def both(attend, **settings):
        def run(q, k, v, bias):
            y, pull = jax.vjp(lambda q, k, v, bias: attend(q, k, v, mask, bias, cfg, **settings), q, k, v, bias)
            return jnp.where((segments > 0)[..., None, None], y, 0), pull(d_y)

        return jax.tree.leaves(jax.jit(run)(q, k, v, bias))

    found = both(attention_blocks.attend, causal=causal)
    for got, want in zip(found, both(attention_xla.attend), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max() + 1e-6)


def test_fewer_queries_than_keys():
    """Cross-attention and the prefill of a longer cache have more keys than queries."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, length, 2, 8)).astype(np.float32) for length in (70, 130, 130))
    mask = jnp.asarray(rng.random((2, 70, 130)) < 0.8)
    cfg = ModelConfig(preset="llama-tiny", d_model=16, heads=2, kv_heads=2, head_dim=8)
    got = jax.jit(lambda q: attention_blocks.attend(q, k, v, mask, None, cfg, causal=False))(q)
    np.testing.assert_allclose(got, attention_xla.attend(q, k, v, mask, None, cfg), atol=1e-6)


def test_a_bias_per_row_is_computed_without_blocks():
    """Rows at different positions of a cache have different biases (T5 with a draft)."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(2, 192, 4, 8)).astype(np.float32) for _ in range(3))
    bias, mask = jnp.asarray(rng.normal(size=(2, 4, 192, 192)).astype(np.float32)), jnp.ones((2, 192, 192), bool)
    cfg = ModelConfig(preset="llama-tiny", d_model=32, heads=4, kv_heads=4, head_dim=8)
    with meshes.use(meshes.make(MeshConfig())):
        assert attention_kernels.uses_blocks() and attention_blocks.pays(2, 4, 192, 192)
        got = attention_kernels.attend(q, k, v, mask, Shared(mask, bias_HTS=bias), jnp.array(False), cfg, cross=False)
    for i in range(2):
        want = attention_xla.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1], bias[i], cfg)
        np.testing.assert_allclose(got[i : i + 1], want, atol=1e-5)


def test_block_sizes():
    """12 heads of 256 queries: one head per block. 9 query heads on 3 keys and causal: 128 of 512 queries."""
    assert attention_blocks.make_plan((16, 12, 256, 32), 256, 256, 0.0, False)[2:] == (1, 256)
    assert attention_blocks.make_plan((4, 3, 3 * 512, 64), 512, 512, 0.0, True)[2:] == (1, 64)
    assert attention_blocks.make_plan((1, 8, 8192, 64), 8192, 8192, 0.0, True)[2:] == (1, 1024)
    assert attention_blocks.make_plan((8, 4, 64, 32), 64, 64, 0.0, False)[2:] == (4, 64)
    plan = attention_blocks.make_plan((1, 1, 160, 8), 160, 160, 0.0, True)
    assert [(q.start, q.stop, k.stop) for q, k in plan.query_blocks(160, 160)] == [(0, 128, 128), (128, 160, 160)]
    assert not attention_blocks.pays(8, 4, 64, 64) and attention_blocks.pays(16, 12, 256, 256)
    assert not attention_blocks.pays(64, 12, 1, 4096)  # decoding
