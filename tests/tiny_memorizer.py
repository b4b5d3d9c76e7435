"""A tiny decoder that learns its texts by heart."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, models, pre_tokenizers

from llmctl.artifacts import artifact
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model import functional
from llmctl.model.config import ModelConfig

COUNT, LENGTH = 8, 16
"""Number of texts, and words per text."""
SYLLABLES = [a + b for a in "bdfklmrst" for b in "aeiou"]
WORDS = ["darn", *random.Random(0).sample([a + b for a in SYLLABLES for b in SYLLABLES], COUNT * LENGTH - 1)]
SIZES = {"d_model": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 64, "layers": 1}


def sentences(seed):
    """Texts of equal length, of the same words in an order that depends on the seed."""
    words = random.Random(seed).sample(WORDS, len(WORDS))
    return [" ".join(words[i : i + LENGTH]) for i in range(0, len(words), LENGTH)]


def tokenizer():
    """Words as tokens."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    return JsonTokenizer(made.to_str().encode(), special={"bos": "<s>", "eos": "</s>", "pad": "<pad>"})


def save(folder):
    """Train a decoder on the ends of `sentences(0)` until it knows them, and return the folder of the artifact."""
    words = tokenizer()
    words.save(folder / "words")
    model = ModelConfig(preset="llama-tiny", vocab_size=words.vocab_size, max_seq_len=128, dropout=0.0, **SIZES)
    ids = np.array(words.encode_batch(sentences(0)))
    # Rows begin anywhere in a text, after BOS, and are padded.
    rows = [[words.bos_id, *text[first:], *[words.pad_id] * first] for text in ids for first in range(LENGTH - 3)]
    rows_NT, steps = jnp.asarray(np.array(rows)), 300
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    def loss(params, tokens):
        real = tokens != words.pad_id
        batch = {"tokens": tokens[:, :-1], "segments": real[:, :-1].astype(jnp.int32)}
        batch["positions"] = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), batch["tokens"].shape)
        x = functional.hidden(model, params, batch)
        logits = functional.head_logits(model, functional.head_params(model, params), x, jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(nll, where=real[:, 1:])

    def step(state, key):
        params, moments = state
        chosen = jax.random.choice(key, len(rows_NT), (48,), replace=False)
        found, grads = jax.value_and_grad(loss)(params, rows_NT[chosen])
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), found

    @jax.jit
    def train(key):
        params = functional.init(model, key)
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))

    (params, _), losses = train(jax.random.key(0))
    assert losses[-1] < 1.5, losses[-1]
    common = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 64}}, "tokenizer_dir": folder / "words"}
    artifact.save(folder / "model", params, model, **common)
    return folder / "model"
