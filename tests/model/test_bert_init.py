"""A new BERT-style encoder attends to equal tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model import functional
from llmctl.model.config import ModelConfig

SIZES = {"vocab_size": 300, "d_model": 64, "layers": 2, "d_ff": 64, "heads": 4, "kv_heads": 4, "head_dim": 16}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_first_layer_of_a_fresh_bert_looks_for_equal_tokens(kv_heads):
    cfg = ModelConfig(preset="bert-tiny", **(SIZES | {"kv_heads": kv_heads}))
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    embed = params["embed"]
    x_ND = embed["tokens"][:32] + embed["positions"][:32] + embed["types"][:1]  # every token elsewhere than its copy
    y_ND = embed["tokens"][:32] + embed["positions"][32:64] + embed["types"][1:]
    x_ND, y_ND = ((a - a.mean(1, keepdims=True)) / a.std(1, keepdims=True) for a in (x_ND, y_ND))

    def first(layer):
        kernel = {name: params["encoder"]["blocks"]["attn"][name]["kernel"][layer] for name in "qk"}
        q_NHK = (x_ND @ kernel["q"]).reshape(32, 4, 16)
        k_NHK = jnp.repeat((y_ND @ kernel["k"]).reshape(32, kv_heads, 16), 4 // kv_heads, axis=1)
        if kv_heads == 2:
            q_NHK, k_NHK = q_NHK[:, ::2], k_NHK[:, ::2]
        scores_NN = np.einsum("nhk,mhk->nm", q_NHK, k_NHK)
        return (scores_NN.argmax(1) == np.arange(32)).mean()

    assert first(0) > 0.95 and first(1) < 0.3
    # of which passage a token is, queries and keys do not see
    apart_D = embed["types"][1] - embed["types"][0]
    for name in "qk":
        seen = (apart_D - apart_D.mean()) @ params["encoder"]["blocks"]["attn"][name]["kernel"]
        assert np.abs(seen[0]).max() < 1e-4 < 1e-2 < np.abs(seen[1]).max()


def test_decoders_begin_as_they_did():
    cfg = ModelConfig(preset="gpt2", **SIZES)
    attention = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))["decoder"]["blocks"]["attn"]
    assert not np.allclose(attention["q"]["kernel"], attention["k"]["kernel"])
