"""Attention with a custom backward pass versus the plain formula: values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model.attention_xla import attend
from llmctl.model.config import ModelConfig

B, T, S, H, G, K = 2, 5, 7, 4, 2, 3


def plain(q, k, v, mask, bias, cfg):
    k, v = (jnp.repeat(a, H // G, axis=2) for a in (k, v))
    s = jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    if cfg.attn_softcap:
        s = cfg.attn_softcap * jnp.tanh(s / cfg.attn_softcap)
    s = jnp.where(mask[:, None], s + bias, -1e30)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(s, axis=-1), v)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_values_and_gradients(softcap):
    key = jax.random.split(jax.random.key(0), 6)
    cfg = ModelConfig(heads=H, kv_heads=G, head_dim=K + 1, attn_scale=K**-0.5, attn_softcap=softcap)
    q, k, v, bias = (
        jax.random.normal(key[i], shape)
        for i, shape in enumerate([(B, T, H, K), (B, S, G, K), (B, S, G, K), (H, T, S)])
    )
    mask = (
        jax.random.bernoulli(key[4], 0.7, (B, T, S)).at[:, :, 0].set(True).at[1, 2].set(False)
    )  # one row sees nothing
    out = jax.random.normal(key[5], (B, T, H, K))

    def both(f):
        loss = jax.value_and_grad(lambda q, k, v, b: jnp.sum(f(q, k, v, mask, b, cfg) * out), argnums=(0, 1, 2, 3))
        return jax.jit(loss)(q, k, v, bias)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), both(plain), both(attend))
