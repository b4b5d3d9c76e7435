"""A conversation's cache: every answer is that of a fresh run, and no token is read twice that stayed where it was."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.model.generate.chat_cache import Session
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.sampling import Sampling

SIZES = {"vocab_size": 64, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 24}
FAMILIES = {
    "llama": {},
    "relative": {"family": "llama", "positions": "relative"},
    "gpt2": {"kv_heads": 4},
    "gemma3": {"window": 5, "window_every": 2},
}
FIRST, MORE = list(range(3, 33)), [5, 9, 40, 41, 7]


def build(family):
    model = ModelConfig(**{**SIZES, "family": family, "max_seq_len": 256, **FAMILIES[family]})
    rng = np.random.default_rng(1)

    def drawn(path, w):  # sharper than fresh weights: answers differ
        middle = path.endswith("norm/scale") and not model.norm_plus_one
        return jnp.asarray(rng.normal(middle, 0.3, w.shape), jnp.float32)

    return Decoder(
        model, weights.unflatten({p: drawn(p, w) for p, w in weights.flatten(functional.abstract(model)).items()})
    )


def answer(of, prompt, new, **options):
    return np.concatenate(list(of.generate([prompt], new, **options)), axis=1)[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_answered_as_by_a_fresh_run(family):
    decoder = build(family)
    session, prompt = Session(decoder), FIRST
    said = answer(session, prompt, 17)
    assert said == answer(decoder, prompt, 17) and session.read == 30
    # What the model said is in the cache, but for its last token.
    prompt = [*prompt, *said, *MORE]
    after = answer(session, prompt, 40)
    assert after == answer(decoder, prompt, 40) and session.read == 30 + 1 + len(MORE)
    assert after[:17] != said
    # The third turn outgrows the cache (64 slots, 128, 256), and the template has left out part of the second.
    prompt = [*prompt[:49], *MORE, *after, *MORE]
    assert answer(session, prompt, 30) == answer(decoder, prompt, 30)
    assert session.read == 36 + len(prompt) - 49
    # The same again needs no more than its last token; a shorter one neither.
    read = session.read
    assert answer(session, prompt[:40], 9) == answer(decoder, prompt[:40], 9) and session.read == read + 1


def test_draws_and_penalties_are_those_of_a_fresh_run_and_answers_may_be_left():
    decoder = build("llama")
    session, rules = Session(decoder), Sampling(temperature=1.0, top_k=20, repetition_penalty=1.3)
    unfinished = session.generate([FIRST], 40)
    said = [next(unfinished), next(unfinished)]
    unfinished.close()
    prompt = [*FIRST, *np.concatenate(said, axis=1)[0].tolist(), *MORE]
    options = {"sampling": rules, "seed": 3, "ends": [2]}
    assert answer(session, prompt, 24, **options) == answer(decoder, prompt, 24, **options)
    assert session.read == len(FIRST) + 1 + len(MORE)
    with pytest.raises(ValueError, match="no tokens"):
        answer(session, [], 4)
    with pytest.raises(ValueError, match="exceed 256"):
        answer(session, prompt, 250)


def test_tokens_behind_the_longest_sequence_spoil_nothing():
    """A table of 256 positions, and a chunk that goes on to 266: what it left in the cache is nobody's, also where the
    template leaves most of the answer out and the next turn is read far before it."""
    decoder, prompt = build("gpt2"), [*FIRST, *range(3, 60), *range(3, 60), *range(3, 59)]
    session = Session(decoder)
    said = answer(session, prompt, 50)
    assert len(prompt) == 200 and said == answer(decoder, prompt, 50)
    after = [*prompt[:100], 5, 9]
    assert answer(session, after, 4) == answer(decoder, after, 4)
