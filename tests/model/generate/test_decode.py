"""Cached generation against full forwards, in every family; batches against rows alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from tiny_decoders import BASE, PROMPTS, VARIANTS, build, generate

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh
from llmctl.model import flops, functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig, families
from llmctl.model.generate.beam import Beams, BeamSearch
from llmctl.model.generate.chat_cache import Session
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING, right_padded
from llmctl.model.generate.sampling import Sampling


def full_forward(model, params, prompts, out_BN):
    """What greedy decoding says at every place of `out_BN`, from one full forward over prompts and continuations.

    It is `out_BN` itself exactly where repeated full forwards would have made that, token by token. An encoder-decoder
    reads the prompts with its encoder, and its decoder begins with token 0.
    """
    source = right_padded(prompts) if model.encoder_layers else {}
    prompts = [[0]] * len(prompts) if source else prompts
    rows = [[*prompt, *out] for prompt, out in zip(prompts, out_BN.tolist(), strict=True)]
    here_T = np.arange(max(map(len, rows)))
    tokens_BT = np.array([row + [0] * (len(here_T) - len(row)) for row in rows])
    segments_BT = np.array([here_T < len(row) for row in rows], np.int32)
    batch = {"tokens": tokens_BT, "segments": segments_BT, "positions": here_T * np.ones_like(tokens_BT)}

    @jax.jit
    def following(params, batch):
        return jnp.argmax(functional.lm_logits(model, params, functional.hidden(model, params, batch)), axis=-1)

    said_BT = np.asarray(following(params, batch | source))
    return [row[len(p) - 1 :][: out_BN.shape[1]].tolist() for p, row in zip(prompts, said_BT, strict=True)]


@pytest.mark.parametrize("name", sorted({*families(), *VARIANTS}))
def test_cached_tokens_are_those_of_full_forwards(name):
    model, params = build(name)
    got = generate(Decoder(model, params), PROMPTS, 64, chunk=63)
    assert got.tolist() == full_forward(model, params, PROMPTS, got)
    assert len({tuple(row) for row in got.tolist()}) > 1


@pytest.fixture(scope="module")
def decoder():
    return Decoder(*build("llama"))


RULES = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


def test_a_row_draws_the_same_in_any_batch_and_chunk(decoder):
    together = generate(decoder, PROMPTS, 12, sampling=RULES, seed=7)
    alone = generate(decoder, PROMPTS[:1], 12, sampling=RULES, seed=7, chunk=5)
    np.testing.assert_array_equal(together[:1], alone)
    assert together.tolist() != generate(decoder, PROMPTS, 12, sampling=RULES, seed=8).tolist()


def test_rows_end_with_an_end_token_and_the_loop_with_the_last_row(decoder):
    free = generate(decoder, PROMPTS, 20, chunk=4)
    ends = {int(free[0, 4]), int(free[1, 9]), int(free[2, 2])}
    chunks = list(decoder.generate(PROMPTS, 20, ends=sorted(ends), chunk=4))
    got = np.concatenate(chunks, axis=1)
    for row, unbounded in zip(got, free, strict=True):
        stop = next(i for i, t in enumerate(unbounded) if int(t) in ends) + 1
        np.testing.assert_array_equal(row[:stop], unbounded[:stop])
        assert (row[stop:] == NOTHING).all()
    assert got.shape[1] <= 1 + 4 * 3


def test_what_cannot_be_continued_is_refused(decoder):
    with pytest.raises(ValueError, match="no tokens"):
        generate(decoder, [[1], []], 4)
    with pytest.raises(ValueError, match="exceed 160"):
        generate(decoder, [[1] * 100], 61)
    with pytest.raises(ValueError, match="does not continue"):
        Decoder(decoder.model.model_copy(update={"head": "classify"}), {})
    with pytest.raises(ValueError, match=r"encoder. stacks and head .lm. does not continue"):
        Decoder(ModelConfig(**BASE, family="bert"), {})


def test_a_caller_may_end_rows_between_chunks(decoder):
    free = generate(decoder, PROMPTS, 20, chunk=4)
    stopped = np.zeros(3, bool)
    rows = []
    for out in decoder.generate(PROMPTS, 20, chunk=4, stopped_B=stopped):
        rows.append(out)
        stopped[1] = True
    got = np.concatenate(rows, axis=1)
    np.testing.assert_array_equal(got[[0, 2]], free[[0, 2]])
    assert got[1, 0] == free[1, 0] and (got[1, 1:] == NOTHING).all()


def test_quantized_low_rank_and_sharded_weights_continue_as_their_full_forwards():
    model, params = build("llama")
    flat = weights.flatten(params)
    for path, w in flat.items():
        if path.endswith("/kernel"):
            flat[path] = weights.Quantized(qwix.quantize(w, "int8", channelwise_axes=[0, 2]))
    a, b = (jax.random.normal(jax.random.key(s), shape) for s, shape in ((4, (2, 16, 2)), (5, (2, 2, 32))))
    name = "decoder/blocks/attn/q/kernel"
    flat[name] = weights.LowRank(flat[name], a, b, 0.2)
    params = weights.unflatten(flat)
    expected = generate(Decoder(model, params), PROMPTS[:2], 16)
    assert expected.tolist() == full_forward(model, params, PROMPTS[:2], expected)

    devices = mesh.make(MeshConfig(data=1, fsdp=4, tensor=2))
    sharded = jax.device_put(params, functional.shardings(model, params, devices))
    with mesh.use(devices):
        np.testing.assert_array_equal(generate(Decoder(model, sharded), PROMPTS[:2], 16), expected)


CACHES = {"llama": "int8", "gemma2": "fp8_e4m3", "t5": "int8", "prefix": "int8"}
"""Families and the format of their cached keys and values."""


@pytest.mark.parametrize(
    "name", [n if n in ("llama", "t5") else pytest.param(n, marks=pytest.mark.slow) for n in CACHES]
)
def test_a_quantized_cache_generates_nearly_the_same_tokens(name):
    model, params = build(name)
    plain, small = (Decoder(model, params, kv_cache=form) for form in ("", CACHES[name]))
    want, got = (generate(decoder, PROMPTS, 24, chunk=23) for decoder in (plain, small))
    assert (got == want).mean() > 0.9
    alone = generate(small, PROMPTS[:1], 24, chunk=23)
    np.testing.assert_array_equal(alone[0], got[0])  # the padding of a batch changes nothing
    prompts, slots = small.inputs(PROMPTS, 24)
    _, state = jax.eval_shape(lambda: small.read(small.weights, prompts, slots))
    slots += prompts.source["encoder_tokens"].shape[1] if prompts.source else 0  # memory of cross-attention
    centers = 4 * len(PROMPTS) * model.layers * model.kv_heads * model.head_dim
    assert bytes_of(state["cache"]) - centers == len(PROMPTS) * slots * flops.kv_cache(model, 4, CACHES[name])


def test_beams_and_conversations_read_a_quantized_cache():
    decoder = Decoder(*build("llama"), kv_cache="int4")
    one, _ = BeamSearch(decoder, Beams(1))(PROMPTS, 12)
    np.testing.assert_array_equal(one[:, 0], generate(decoder, PROMPTS, 12, chunk=11))
    # A prompt of fewer than 16 tokens has no center, so its keys are computed again when the prompt is longer.
    for prompt, again in (PROMPTS[1], True), (2 * PROMPTS[1], False):
        session = Session(decoder)
        first = generate(session, [prompt], 12, chunk=11)
        if again:
            np.testing.assert_array_equal(first, one[1:2, 0])
        longer = [*prompt, *first[0].tolist(), 5, 6]
        np.testing.assert_array_equal(generate(session, [longer], 6), generate(decoder, [longer], 6))
        assert (session.read == len(prompt) + len(longer)) == again
