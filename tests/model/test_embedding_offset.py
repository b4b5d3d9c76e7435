"""Offsets of token embeddings as an input of the forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model import functional
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "vocab_size": 32}
B, T = 2, 5


def some_batch(cfg, tokens):
    found = {"tokens": tokens, "segments": np.ones((B, T), np.int32), "positions": np.arange(T) * np.ones_like(tokens)}
    found |= {f"encoder_{name}": a for name, a in found.items()} if cfg.encoder_layers else {}
    return {name: jnp.asarray(a) for name, a in found.items()}


@pytest.mark.parametrize(
    "preset, changes, name",
    [
        ("llama-tiny", {}, "embedding_offset"),
        ("gemma2-2b", {"max_seq_len": 16, "window": 4}, "embedding_offset"),
        ("bert-tiny", {"max_seq_len": 16}, "embedding_offset"),
        ("t5-small", {"encoder_layers": 1}, "embedding_offset"),
        ("t5-small", {"encoder_layers": 1}, "encoder_embedding_offset"),
    ],
)
def test_an_offset_is_the_same_as_other_rows_of_the_table(preset, changes, name):
    cfg = ModelConfig(preset=preset, **SIZES, **changes)
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    tokens = np.arange(B * T, dtype=np.int32).reshape(B, T)  # every row of the table is read at most once per stack
    batch, weight = some_batch(cfg, tokens), jax.random.normal(jax.random.key(1), (B, T, cfg.d_model))
    if cfg.encoder_layers:  # the two stacks share the table and read different rows
        other = "tokens" if name.startswith("encoder") else "encoder_tokens"
        batch[other] = batch[other] + B * T

    def by_offset(offset_BTD):
        return jnp.sum(functional.hidden(cfg, params, batch | {name: offset_BTD}) * weight)

    def by_table(offset_BTD):
        table = params["embed"]["tokens"].at[tokens].add(offset_BTD)
        return jnp.sum(functional.hidden(cfg, params | {"embed": params["embed"] | {"tokens": table}}, batch) * weight)

    at = 0.1 * jax.random.normal(jax.random.key(2), (B, T, cfg.d_model))
    got, want = (jax.jit(jax.value_and_grad(form))(at) for form in (by_offset, by_table))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-3, atol=1e-4)
