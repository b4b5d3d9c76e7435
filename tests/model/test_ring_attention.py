"""Ring attention versus plain attention: packed documents, windows, soft caps, grouped heads, biases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig
from llmctl.distributed import context_parallel
from llmctl.distributed import mesh as meshes
from llmctl.model import ring_attention
from llmctl.model.attention import distances, share, visible
from llmctl.model.attention_xla import attend
from llmctl.model.config import ModelConfig
from llmctl.model.relative_bias import bucket_of

SIZES = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 32, "vocab_size": 64}
B, T, S = 2, 48, 32
CONTEXT = {"data": 1, "context": 8}
MIXED = {"data": 2, "context": 2, "tensor": 2}

CASES = {
    "causal": (CONTEXT, True, {}, False),
    "causal, heads and rows split": (MIXED, True, {}, False),
    "mutual": (CONTEXT, False, {}, False),
    "window": (CONTEXT, True, {"window": 5}, True),
    "a global layer among windows": (MIXED, True, {"window": 5, "window_every": 2}, False),
    "window both ways": (MIXED, False, {"window": 20}, True),
    "capped and scaled": (MIXED, True, {"attn_softcap": 2.0, "attn_scale": 0.5}, False),
    "biased": (MIXED, True, {"positions": "relative", "relative_buckets": 8, "relative_max_distance": 20}, False),
    "biased both ways": (CONTEXT, False, {"positions": "relative", "relative_buckets": 8}, False),
    "a memory": (MIXED, False, {}, False),
}


def both_ways(form, seen):
    """A form's output and gradients, where somebody reads them."""

    @jax.jit
    def run(operands, table, d_y):
        y, pull = jax.vjp(form, *operands, table)
        return jnp.where(seen, y, 0), *pull(jnp.where(seen, d_y, 0))

    return run


@pytest.mark.parametrize("axes, causal, changes, local", CASES.values(), ids=CASES)
def test_the_ring_is_the_plain_form(request, axes, causal, changes, local):
    cfg = ModelConfig(**{"preset": "llama-tiny", **SIZES, **changes})
    memory = request.node.callspec.id == "a memory"
    mesh = meshes.make(MeshConfig(**axes))
    rng = np.random.default_rng(0)
    keys = S if memory else T
    q, d_y = (rng.normal(size=(B, T, 4, 8)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(B, keys, 2, 8)).astype(np.float32) for _ in range(2))
    table = rng.normal(size=(cfg.relative_buckets, 4)).astype(np.float32)
    segments = np.repeat([[1, 1, 2, 3], [1, 2, 2, 0]], T // 4, axis=1).astype(np.int32)
    of_keys = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], S // 4, axis=1).astype(np.int32) if memory else segments
    seen = (segments > 0)[..., None, None]
    biased = cfg.positions == "relative"
    bucket = partial(bucket_of, cfg, not causal)

    def plain(q, k, v, table):
        shared = share(cfg, jnp.asarray(segments), jnp.zeros((B, T), jnp.int32), causal=causal)
        bias = jnp.moveaxis(table[bucket(distances(shared.mask_BTS, None, None))], -1, 0) if biased else None
        mask = shared.local_mask_BTS if local else shared.mask_BTS
        mask = visible(jnp.asarray(segments), jnp.asarray(of_keys)) if memory else mask
        return attend(q, k, v, mask, bias, cfg)

    order, order_of_keys = (context_parallel.order(n, mesh.shape["context"]) for n in (T, keys))

    def around(q, k, v, table):
        return ring_attention.attend(
            q, k, v, jnp.asarray(segments[:, order]), jnp.asarray(of_keys[:, order_of_keys]), cfg,
            causal=causal, local=jnp.asarray(local), table_UH=table if biased else None, bucket=bucket,
        )  # fmt: skip

    want = both_ways(plain, seen)((q, k, v), table, d_y)
    with meshes.use(mesh):
        moved = (q[:, order], k[:, order_of_keys], v[:, order_of_keys])
        got = both_ways(around, seen[:, order])(moved, table, d_y[:, order])
    orders = (order, order, order_of_keys, order_of_keys)
    for a, b, at in zip(got, want[:4], orders, strict=False):
        np.testing.assert_allclose(a, np.asarray(b)[:, at], atol=2e-5 * np.abs(b).max() + 1e-6)
    np.testing.assert_allclose(got[4], want[4], atol=2e-5 * np.abs(want[4]).max() + 1e-6)
    assert (np.abs(want[4]).max() > 0) == biased
