"""Tiny models of every family that generate varied text, for tests of decoding."""

import jax.numpy as jnp
import numpy as np

from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig, families, family

BASE = {
    "vocab_size": 64,
    "d_model": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "d_ff": 24,
    "max_seq_len": 160,
    "dropout": 0.0,
}
WINDOW = {"window": 5, "window_every": 2}
VARIANTS = {
    "gemma3": WINDOW | {"rope_local_theta": 500.0},
    "gemma2": WINDOW,
    "modern": WINDOW,
    "mistral": {"window": 5},
    "t5": {"encoder_layers": 2},
    "original": {"encoder_layers": 2, "kv_heads": 4, "tied": False},
    "t5-v1.1": {"preset": "t5-v1.1-tiny", "encoder_layers": 2},
    "relative": {"positions": "relative"},
    "prefix": WINDOW | {"prefix_tokens": 3, "positions": "learned"},
    "t5-prefix": {"preset": "t5-v1.1-tiny", "encoder_layers": 2, "prefix_tokens": 3},
}
"""What a tiny model of a family needs (windows that roll within 64 tokens), and what no family has."""
PROMPTS = [[2, 5, 9], [2, 7, 7, 7, 30, 41, 1, 8, 19], [3]]


def build(name):
    given = {"family": name} if name in families() else {}
    if given and family(name).FLAGS["architecture"] == "encoder":  # its blocks, made causal
        given |= {"architecture": "decoder", "pooler": False, "next_sentence": False}
    model = ModelConfig(**{**BASE, **given, **VARIANTS.get(name, {})})
    # Sharper than fresh weights, so that continuations differ and do not hang on ties; drawn by numpy: none compiles.
    # Post-norm layers repeat one token for ever where their weights drown the positions.
    rng, deviation = np.random.default_rng(1), 0.15 if name == "original" else 0.3

    def drawn(path, w):
        middle = path.endswith("norm/scale") and not model.norm_plus_one
        return jnp.asarray(rng.normal(middle, deviation, w.shape), jnp.float32)

    return model, weights.unflatten({p: drawn(p, w) for p, w in weights.flatten(functional.abstract(model)).items()})


def generate(decoder, prompts, new, **settings):
    return np.concatenate(list(decoder.generate(prompts, new, **settings)), axis=1)
