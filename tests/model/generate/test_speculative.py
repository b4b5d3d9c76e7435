"""Speculative decoding against decoding without a draft: equal tokens, and the distribution of sampled tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import BASE, PROMPTS, build, generate

from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING
from llmctl.model.generate.sampling import Sampling, adjust_logits
from llmctl.model.generate.speculative import Acceptance, SpeculativeDecoder
from llmctl.model.generate.speculative_sampling import verify_sampled


def pair(name, noise=0.08, **options):
    """Return the decoders of a model of a family, and of a draft with the same weights plus noise."""
    model, params = build(name)
    rng = np.random.default_rng(3)
    noisy = jax.tree.map(lambda w: w + jnp.asarray(rng.normal(0, noise, w.shape), jnp.float32), params)
    return Decoder(model, params, **options), Decoder(model, noisy, **options)


@pytest.fixture(scope="module")
def llama():
    return pair("llama")


@pytest.mark.parametrize("name", ["gemma3", "t5", "prefix", "relative"])
def test_every_family_generates_the_tokens_of_the_target(name):
    """Windows, relative positions, trained prefixes and cross-attention follow each row's own cache position."""
    target, draft = pair(name)
    fast = SpeculativeDecoder(target, draft, 3)
    np.testing.assert_array_equal(generate(fast, PROMPTS, 48), generate(target, PROMPTS, 48))
    assert 0 < fast.acceptance.accepted < fast.acceptance.judged


def test_rows_alone_and_together_end_and_stream_as_without_a_draft(llama):
    target, draft = llama
    fast = SpeculativeDecoder(target, draft, 3)
    free = generate(target, PROMPTS, 40)
    np.testing.assert_array_equal(generate(fast, PROMPTS, 40, chunk=5), free)
    for row, prompt in enumerate(PROMPTS[:2]):
        np.testing.assert_array_equal(generate(fast, [prompt], 40), free[row : row + 1])
    ends = sorted({int(free[0, 4]), int(free[1, 9]), int(free[2, 2])})
    want, got = (generate(decoder, PROMPTS, 40, ends=ends, chunk=4) for decoder in (target, fast))
    both = max(want.shape[1], got.shape[1])
    want, got = (np.pad(a, ((0, 0), (0, both - a.shape[1])), constant_values=NOTHING) for a in (want, got))
    np.testing.assert_array_equal(got, want)
    stopped, rows = np.zeros(3, bool), []
    for out in fast.generate(PROMPTS, 40, chunk=4, stopped_B=stopped):
        rows.append(out)
        stopped[1] = True
    got = np.concatenate(rows, axis=1)
    np.testing.assert_array_equal(got[[0, 2]], free[[0, 2]])
    assert got[1, 0] == free[1, 0] and (got[1, 1:] == NOTHING).all()


def test_acceptance_of_the_target_as_its_own_draft(llama):
    """Equal models accept every token: 1 + 4 * 5 tokens take four steps, which are counted per row.

    If the last step of a row has room for three tokens, two of its five tokens are not judged.
    """
    target = llama[0]
    fast = SpeculativeDecoder(target, target, 4)
    np.testing.assert_array_equal(generate(fast, PROMPTS, 21), generate(target, PROMPTS, 21))
    counts = fast.acceptance
    assert (counts.steps, counts.judged, counts.accepted, counts.tokens) == (12, 48, 48, 60)
    assert counts.rate == 1.0 and counts.tokens_per_step == 5.0
    fast.acceptance = Acceptance()
    generate(fast, PROMPTS, 19)
    counts = fast.acceptance
    assert (counts.steps, counts.judged, counts.accepted, counts.tokens) == (12, 45, 45, 54)


def test_the_longest_sequence_is_filled_to_the_last_position():
    """Proposals beyond the position table change nothing, nor does a draft with a shorter table."""
    (model, params), draft = build("gpt2"), pair("gpt2")[1]
    target, embed = Decoder(model, params), params["embed"]
    short = {**params, "embed": embed | {"positions": embed["positions"][:100]}}
    shorter = Decoder(model.model_copy(update={"max_seq_len": 100}), short)
    want = generate(target, PROMPTS, 151)
    for one in (draft, shorter):
        np.testing.assert_array_equal(generate(SpeculativeDecoder(target, one, 5), PROMPTS, 151), want)


def test_a_quantized_cache_and_a_repetition_penalty():
    target, draft = pair("llama", kv_cache="int8")
    rules = Sampling(repetition_penalty=1.3)
    prompts = [[*range(2, 30)], PROMPTS[1]]  # one with the 16 tokens that the center of the keys needs
    want = generate(target, prompts, 40, sampling=rules)
    fast = SpeculativeDecoder(target, draft, 1)
    np.testing.assert_array_equal(generate(fast, prompts, 40, sampling=rules), want)
    assert want.tolist() != generate(target, prompts, 40).tolist()


RULES = Sampling(temperature=0.8, top_k=4, top_p=0.9, repetition_penalty=1.2)
V, NEW, ROWS = 4, 3, 1024


def sequence_probabilities(model, params, prompt):
    """Return the probability of every sequence of NEW tokens under `RULES`, by full forward passes."""
    new = np.array(list(itertools.product(range(V), repeat=NEW)))
    tokens = np.concatenate([np.tile(prompt, (len(new), 1)), new], axis=1)
    ones = np.ones_like(tokens)
    batch = {"tokens": tokens, "segments": ones, "positions": np.arange(tokens.shape[1]) * ones}
    seen = [[[v in row[: len(prompt) + i] for v in range(V)] for i in range(NEW)] for row in tokens.tolist()]

    @jax.jit
    def each(params, batch, seen_SNV):
        logits = functional.lm_logits(model, params, functional.hidden(model, params, batch))[:, len(prompt) - 1 : -1]
        p_AV = jax.nn.softmax(adjust_logits(logits.reshape(-1, V), seen_SNV.reshape(-1, V), RULES))
        return p_AV.reshape(-1, NEW, V)

    p = np.asarray(each(params, batch, np.array(seen)), np.float64)
    return np.prod(np.take_along_axis(p, new[..., None], axis=2), axis=(1, 2))


def test_verified_samples_have_the_distribution_of_the_target():
    """The first token has the distribution p, and is accepted with probability sum(min(p, q)); z-scores below 4.5.

    A right program fails this test for fewer than 1 of 10,000 seeds.
    """
    rng, rows, vocab = np.random.default_rng(0), 20_000, 5
    p, q = (rng.dirichlet(np.ones(vocab), size) for size in (3, 2))
    proposed = np.stack([rng.choice(vocab, rows, p=q_V) for q_V in q], axis=1)
    logits = [jnp.broadcast_to(jnp.log(a), (rows, *a.shape)) for a in (q, p)]
    keys = jax.random.split(jax.random.key(1), (2, rows))
    accepted, following = jax.jit(verify_sampled)(jnp.asarray(proposed), *logits, *keys)
    accepted, following = np.asarray(accepted), np.asarray(following)

    def close(count, expected, of):
        assert abs(count - of * expected) < 4.5 * np.sqrt(of * expected * (1 - expected))

    first = np.where(accepted > 0, proposed[:, 0], following)
    second = np.where(accepted > 1, proposed[:, 1], following)[accepted > 0]
    for token in range(vocab):
        close((first == token).sum(), p[0, token], rows)
        close((second == token).sum(), p[1, token], len(second))
        close((following[accepted == 2] == token).sum(), p[2, token], (accepted == 2).sum())
    close((accepted > 0).sum(), np.minimum(p[0], q[0]).sum(), rows)


@pytest.mark.slow
def test_sampling_keeps_the_distribution_of_the_target():
    """Chi-square test of 6,144 samples of 3 tokens against the enumerated distribution, with a fixed seed.

    A right program fails this test for 1 of 10,000 seeds. The draft's distribution fails it by far.
    """
    model = ModelConfig(**{**BASE, "family": "llama", "vocab_size": V, "layers": 1, "max_seq_len": 16})
    rng = np.random.default_rng(5)
    params, other = (
        jax.tree.map(lambda w: jnp.asarray(rng.normal(0, 0.4, w.shape), jnp.float32), functional.abstract(model))
        for _ in range(2)
    )
    fast = SpeculativeDecoder(Decoder(model, params), Decoder(model, other), 2)
    prompt = [1, 3]
    rows = [
        generate(fast, [prompt] * ROWS, NEW, sampling=RULES, seed=11, first=first)
        for first in range(0, 6 * ROWS, ROWS)
    ]  # fmt: skip
    codes = np.concatenate(rows) @ V ** np.arange(NEW - 1, -1, -1)
    counts = np.bincount(codes, minlength=V**NEW)
    assert 0.1 < fast.acceptance.rate < 0.9

    p, q = (sequence_probabilities(model, weights, prompt) for weights in (params, other))
    assert not counts[p == 0].any()
    frequent = p * len(codes) >= 5  # the rest are one cell

    def chi_square(p):
        found, expected = (np.append(a[frequent], a[~frequent].sum()) for a in (counts, p * len(codes)))
        return np.sum((found - expected) ** 2 / np.maximum(expected, 1))

    freedom = frequent.sum()
    # Quantile of the chi-square distribution at 1 - 1e-4 (Wilson and Hilferty, 1931).
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square(p) < limit < chi_square(q) / 10


def test_architectures_must_agree(llama):
    t5 = Decoder(build("t5")[0], {})
    with pytest.raises(RequestError, match="architecture of its target"):
        SpeculativeDecoder(llama[0], t5)
