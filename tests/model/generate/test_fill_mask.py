"""Masks filled by an encoder that has learned a text by heart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.fill_mask import Filler

SIZES = {"d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 8, "max_seq_len": 24}


@pytest.fixture(scope="module")
def filler():
    tokenizer = ByteTokenizer.new()
    model = ModelConfig(preset="bert-tiny", **SIZES, vocab_size=tokenizer.vocab_size + 3)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    # whatever it reads, it says "o", then "e"; the mask itself and rows without a token would be likelier still
    bias = jnp.zeros(model.vocab_size).at[tokenizer.encode("o")[0]].set(50.0).at[tokenizer.encode("e")[0]].set(49.0)
    bias = bias.at[tokenizer.mask_id].set(99.0).at[-1].set(99.0)
    params["lm_head"]["bias"] = bias
    return Filler(model, params, tokenizer)


def test_every_mask_gets_the_likeliest_ordinary_tokens(filler):
    (filled,) = filler.fill(["g<mask><mask>d"], k=2)
    assert filled.text == "good"
    assert [[token for token, _ in mask] for mask in filled.masks] == [["o", "e"]] * 2
    p = np.array([[p for _, p in mask] for mask in filled.masks])
    assert (p[:, 0] > p[:, 1]).all() and p.sum(1) == pytest.approx(1, abs=1e-3)


def test_what_has_no_mask_or_is_too_long_is_refused(filler):
    with pytest.raises(RequestError, match="has no <mask>"):
        filler.fill(["good"])
    with pytest.raises(RequestError, match="longest sequence"):
        filler.fill(["<mask>" + "a" * 30])
    with pytest.raises(RequestError, match="does not fill"):
        Filler(ModelConfig(), {}, filler.tokenizer)
