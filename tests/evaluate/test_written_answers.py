"""Written answers: those of each prompt alone, in any batch, and of the parameters that are given."""

import jax
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.evaluate.written_answers import Writer
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.continuations import Continuation, continue_rows
from llmctl.model.generate.decode import Decoder

SIZES = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "d_ff": 16, "max_seq_len": 96}
WORDS = ByteTokenizer.new()
PROMPTS = ["abc", "x", "a longer prompt than the others, of several words", "de", "b" * 80]


@pytest.fixture(scope="module", params=["llama-tiny", "t5-tiny"])
def model(request):
    more = {"encoder_layers": 1, "kv_heads": 2} if request.param == "t5-tiny" else {}
    return ModelConfig(preset=request.param, **{**SIZES, **more}, vocab_size=WORDS.vocab_size, dropout=0.0)


@pytest.fixture(scope="module")
def params(model):
    # Larger than usual, so that different prompts have different answers.
    make = jax.jit(lambda key: jax.tree.map(lambda a: 4 * a, functional.init(model, key)))
    return [make(jax.random.key(seed)) for seed in range(2)]


def writer(model, batch_size=3, **settings):
    settings = GenerationConfig(**{"max_new": 6, **settings})
    return Writer(model, WORDS, settings, seq_len=60, batch_size=batch_size, dtype="float32")


def test_answers_are_those_of_each_prompt_alone(model, params):
    write = writer(model)
    encoder = model.architecture == "encoder_decoder"
    for own in (params[0], params[1], params[0]):
        decoder, expected = Decoder(model, own, start=WORDS.pad_id), []
        for prompt in PROMPTS:
            if encoder:
                row = Continuation(prompt, [], source_ids=[2, *WORDS.encode(prompt)[:58], 3])
            else:
                row = Continuation(prompt, [2, *WORDS.encode(prompt)[-59:]])
            list(continue_rows(decoder, WORDS, [row], 6))
            expected.append(row.text)
        assert write(own, PROMPTS) == expected and write.cut == 1
        assert len(set(expected)) > 1


def test_a_request_to_stop_is_heeded_before_each_batch(model, params):
    heard: list[int] = []

    def check_stop():
        heard.append(1)
        if len(heard) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        writer(model)(params[0], PROMPTS, check_stop)


def test_programs_are_compiled_once(model, params):
    write = writer(model, batch_size=5)
    write(params[0], PROMPTS)
    sizes = [f._cache_size() for f in (write._decoder._prefill, write._decoder._decode)]
    write(params[1], PROMPTS)
    assert [f._cache_size() for f in (write._decoder._prefill, write._decoder._decode)] == sizes
    assert write._decoder.weights == ({}, [])


def test_answers_of_a_beam_search(model, params):
    from llmctl.model.generate.beam import Beams, BeamSearch
    from llmctl.model.generate.continuations import search_rows

    found = writer(model, batch_size=2, beams=3)(params[0], PROMPTS[:2])
    search = BeamSearch(Decoder(model, params[0], start=WORDS.pad_id), Beams(3))
    for prompt, text in zip(PROMPTS, found, strict=False):
        encoder = model.architecture == "encoder_decoder"
        ids = [2, *WORDS.encode(prompt)]
        row = Continuation(prompt, [], source_ids=[*ids, 3]) if encoder else Continuation(prompt, ids)
        search_rows(search, WORDS, [row], 6)
        assert row.text == text


def test_answers_that_leave_no_room_are_refused(model):
    with pytest.raises(RequestError, match="96 new tokens leave no room within the model's longest sequence"):
        writer(model, max_new=96)


def test_arrays_on_many_devices(model, params):
    """Replicated arrays are used where they are; sharded ones are gathered."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:2]), "x")

    def split(a):
        spec = [None] * a.ndim
        if a.shape[-1] % 2 == 0:
            spec[-1] = "x"
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

    write = writer(model)
    expected = write(params[0], PROMPTS[:3])
    assert write(jax.tree.map(split, params[0]), PROMPTS[:3]) == expected
    replicated = jax.device_put(params[0], NamedSharding(mesh, PartitionSpec()))
    assert write(replicated, PROMPTS[:3]) == expected


def test_answers_end_at_every_end_token(model):
    settings = GenerationConfig(max_new=6)
    make = lambda **kw: Writer(model, WORDS, settings, seq_len=60, batch_size=1, dtype="float32", **kw)  # noqa: E731
    assert (make().ends, make(ends=[3, 7]).ends) == ([WORDS.eos_id], [3, 7])
