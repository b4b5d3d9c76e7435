"""Beam search against transformers' on random models: the same tokens and scores; and a search worked out by hand."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

from llmctl.config.errors import RequestError
from llmctl.convert import hf_folder as folders
from llmctl.model.generate.beam import Beams, BeamSearch
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING

VOCAB, END, NEW = 41, 2, 14
PROMPTS = [[5, 9, 30, 11], [7, 7, 38, 40, 4, 8, 19], [3]]


@functools.cache
def pair(kind, tmp):
    """transformers' model and our decoder of the same weights, sharp enough that beams differ and end."""
    torch.manual_seed(3)
    common = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": END}
    if kind == "t5":
        config = hf.T5Config(
            **common, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
            relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
        )  # fmt: skip
        theirs = hf.T5ForConditionalGeneration(config).eval()
    else:
        config = hf.LlamaConfig(
            **common, bos_token_id=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64, head_dim=8,
        )  # fmt: skip
        theirs = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(0.4 * torch.randn(p.shape) + ("norm" in name))
        theirs.get_output_embeddings().weight[END] *= 2.0  # the end is likely at some places and unlikely at others
    theirs.save_pretrained(tmp / kind)
    found = folders.inspect(tmp / kind)
    return theirs, Decoder(found.model, folders.load(found, lambda _, w: jnp.asarray(w.read(()))))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("beams")
    return lambda kind: pair(kind, tmp)


STOP = {"no": False, "yes": True, "never": "never"}


def expected(theirs, prompt, beams, new=NEW):
    """(answers without padding, scores) of transformers, all W of them."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=beams.width, num_return_sequences=beams.width,
            length_penalty=beams.length_penalty, early_stopping=STOP[beams.early_stopping], max_new_tokens=new,
            do_sample=False, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    begin = 1 if theirs.config.is_encoder_decoder else len(prompt)
    rows = [row[begin:].tolist() for row in out.sequences]
    return [row[: row.index(END) + 1] if END in row else row for row in rows], out.sequences_scores.numpy()


RULES = [Beams(4), Beams(3, 0.0, "yes"), Beams(4, 2.0, "never"), Beams(2, -1.0)]


@pytest.mark.parametrize(
    ("kind", "beams"),
    [
        *(("llama", rule) for rule in RULES),
        *(("t5", rule) for rule in RULES[:2]),
        # The rules do not depend on the architecture.
        *(pytest.param("t5", rule, marks=pytest.mark.slow) for rule in RULES[2:]),
    ],
    ids=lambda b: b if isinstance(b, str) else b.early_stopping,
)
def test_answers_and_scores_are_those_of_transformers(kind, beams, models):
    theirs, decoder = models(kind)
    prompts = PROMPTS if kind == "llama" else [[*p, 1] for p in PROMPTS]
    got, scores = BeamSearch(decoder, beams)(prompts, NEW, [END])
    lengths = set()
    for b, prompt in enumerate(prompts):
        answers, wanted = expected(theirs, prompt, beams)
        ours = [[t for t in row if t != NOTHING] for row in got[b].tolist()]
        assert ours == answers
        np.testing.assert_allclose(scores[b], wanted, rtol=1e-5)
        lengths |= set(map(len, answers))
    # Some ended and some did not: both kinds were compared. A positive penalty lets the long ones win everywhere.
    assert len(lengths) > 1 or beams.length_penalty >= 1


def test_one_beam_is_greedy(models):
    _, decoder = models("llama")
    got, scores = BeamSearch(decoder, Beams(1, 0.0))(PROMPTS, 9)
    greedy = np.concatenate(list(decoder.generate(PROMPTS, 9)), axis=1)
    np.testing.assert_array_equal(got[:, 0], greedy)
    assert (scores < 0).all()


def test_what_cannot_be_searched_is_refused(models):
    _, decoder = models("llama")
    with pytest.raises(RequestError, match="too many for 41 tokens"):
        BeamSearch(decoder, Beams(21))(PROMPTS, 4, [END])
    for wrong in ({"width": 0}, {"width": 2, "early_stopping": "soon"}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Beams(**wrong)


@pytest.mark.parametrize("penalty", [math.nan, math.inf, -math.inf, 1e300, -7.0])
def test_length_penalties_that_leave_the_range_of_float32(penalty):
    with pytest.raises(ValueError, match="length_penalty must be from -6 to 6"):
        Beams(2, penalty)
