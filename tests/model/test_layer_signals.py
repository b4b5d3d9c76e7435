"""Losses on inner layers versus plain numpy: values, and gradients by central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from central_differences import slope

from llmctl.model import functional, layer_signals, layerwise, token_relations
from llmctl.model.config import ModelConfig
from llmctl.model.layer_signals import Inner, Signals

B, T, D, E, W, R = 2, 6, 4, 6, 8, 2
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
REAL = SEGMENTS > 0


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def relation(a, b, t, head):
    """Return the distribution over the tokens of the text of token t, of one relation head."""
    part = a.shape[-1] // R
    own = a[b, :, head * part : (head + 1) * part]
    scores = np.array([own[t] @ own[s] / np.sqrt(part) for s in range(T) if SEGMENTS[b, s] == SEGMENTS[b, t]])
    e = np.exp(scores - scores.max())
    return e / e.sum()


@pytest.mark.parametrize("block", [1, 3, 6])
def test_relations_equal_a_loop_over_tokens_and_heads(block, monkeypatch):
    student, teacher = draw(B, T, W), draw(B, T, 2 * W, seed=1)
    monkeypatch.setattr(token_relations, "chunk_length", lambda *_: block)

    def plain(student):
        every = [(b, t, h) for b in range(B) for t in range(T) for h in range(R) if REAL[b, t]]
        pairs = [(relation(teacher, *at), relation(student, *at)) for at in every]
        return sum(np.sum(p * np.log(p / q)) for p, q in pairs) / len(every)

    ours = jax.jit(jax.value_and_grad(lambda x: token_relations.divergence(x, teacher, SEGMENTS, R)))
    found, got = ours(jnp.asarray(student, jnp.float32))
    np.testing.assert_allclose(found, plain(student), rtol=1e-5)
    np.testing.assert_allclose(got, slope(plain, student), rtol=1e-5, atol=1e-6)


def test_no_map_of_all_pairs_is_stored_in_either_pass():
    """The largest array of the compiled gradient is a block of relations, and not a map [B, R, T, T]."""
    T = 4096
    shape = jax.ShapeDtypeStruct((1, T, W), jnp.float32)
    ones = jnp.ones((1, T), jnp.int32)
    fn = jax.jit(jax.grad(lambda x, y: token_relations.divergence(x, y, ones, R)))
    found = fn.lower(shape, shape).compile().memory_analysis()
    assert found.temp_size_in_bytes < 4 * R * T * T


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("narrow", [True, False])
def test_states_and_embeddings_equal_the_plain_formula(distance, narrow):
    signals = Signals(hidden=1.0, embeddings=1.0, pairs=((0, 1), (1, 3)), distance=distance)
    width = D if narrow else E
    x, y = draw(3, B, T, width), draw(3, B, T, E, seed=1)
    w = {"hidden": draw(2, D, E, seed=2), "embeddings": draw(D, E, seed=3)} if narrow else {}

    def mean(a, b):
        each = np.mean((a - b) ** 2, -1)
        if distance == "cosine":
            each = 1 - np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        return each[REAL].mean()

    def plain(x, w):
        own = [x[i] @ w["hidden"][i] if w else x[i] for i in (0, 1)]
        own.append(x[2] @ w["embeddings"] if w else x[2])
        return 0.5 * (mean(own[0], y[0]) + mean(own[1], y[1])) + mean(own[2], y[2])

    def ours(x, w):
        student = Inner({0: x[0], 1: x[1], -1: x[2]}, {})
        teacher = Inner({1: y[0], 3: y[1], -1: y[2]}, {})
        return sum(signals.losses(student, teacher, SEGMENTS, w).values())

    found, got = jax.value_and_grad(ours, argnums=(0, 1))(*jax.tree.map(jnp.float32, (jnp.asarray(x), w)))
    np.testing.assert_allclose(found, plain(x, w), rtol=1e-5)
    want = (slope(lambda a: plain(a, w), x), {n: slope(lambda a, n=n: plain(x, {**w, n: a}), w[n]) for n in w})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


SIZES = {"d_model": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 4, "d_ff": 24, "vocab_size": 32}
PRESETS = {"llama-tiny": {"qk_norm": True}, "bert-tiny": {"max_seq_len": 16}, "t5-small": {"encoder_layers": 2}}


@pytest.mark.parametrize("preset", PRESETS)
def test_heads_are_those_that_the_layer_computes(preset):
    """Queries, keys and values equal the products of the inputs that the layer's matrices read."""
    kv = {"kv_heads": 2 if preset == "llama-tiny" else 4}
    cfg = ModelConfig(preset=preset, **(SIZES | PRESETS[preset] | kv))
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    batch = {n: a + 1 for n, a in functional.example_batch(cfg, 1, 5).items()}
    stack = functional.stacks(cfg)[-1]
    memory = layerwise.encode(cfg, params, batch) if cfg.encoder_layers else None
    carry = layerwise.embed(cfg, params, batch, memory)
    layer = layerwise.layer_params(params, stack, 0)
    carry, _ = layerwise.block(cfg, stack, layer, carry, 0)
    layer = layerwise.layer_params(params, stack, 1)
    _, taps = layerwise.block(cfg, stack, layer, carry, 1, taps=True)
    found = layer_signals.heads_of(cfg, params, 1, carry.x_BTD)
    for name in ("q", "k", "v"):
        want = taps[f"attn/{name}"] @ layer["attn"][name]["kernel"] + layer["attn"][name].get("bias", 0.0)
        if cfg.qk_norm and name != "v":
            parts = want.reshape(-1, cfg.head_dim)
            parts = parts / np.sqrt(np.mean(np.square(parts), -1, keepdims=True) + cfg.norm_eps)
            want = (parts * layer["attn"][f"{name}_norm"]["scale"]).reshape(want.shape)
        np.testing.assert_allclose(found[name].reshape(want.shape), want, atol=1e-5)
