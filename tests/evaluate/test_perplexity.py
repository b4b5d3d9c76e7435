"""Perplexity against hand-computed values and against the model run on each document by itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import WorkError
from llmctl.config.settings import MeshConfig
from llmctl.data.device_batches import DeviceBatches
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import perplexity as P
from llmctl.model import functional
from llmctl.model.config import ModelConfig

ONE = meshes.make(MeshConfig())
MODEL = ModelConfig(vocab_size=23, d_model=8, layers=2, heads=2, kv_heads=1, head_dim=4, d_ff=12, max_seq_len=64)
DOCUMENTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [4, 9], [20], [3, 1, 4, 1, 5, 9, 2, 6]]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda w: w * 3, jax.jit(lambda key: functional.init(MODEL, key))(jax.random.key(0)))


@jax.jit
def log_probabilities(params, tokens_T, length):
    """After the last of `length` tokens, from a forward over them alone."""
    here_T = jnp.arange(tokens_T.shape[0])
    batch = {"tokens": tokens_T[None], "segments": (here_T < length)[None].astype(jnp.int32), "positions": here_T[None]}
    return jax.nn.log_softmax(
        functional.lm_logits(MODEL, params, functional.hidden(MODEL, params, batch)[0, length - 1])
    )


def by_hand(params, documents, context, stride):
    """NLL of each target from the window that the definition gives it, one target at a time."""
    total = 0.0
    for document in documents:
        sequence = [2, *document]
        for target in range(1, len(sequence)):
            # The first window ends after `context` inputs, the others `stride` later each.
            end = context
            while end < target:
                end += stride
            begin = max(0, min(end, len(sequence) - 1) - context)
            inputs = sequence[begin:target]
            tokens_T = np.array(inputs + [0] * (context - len(inputs)))
            total -= float(log_probabilities(params, tokens_T, len(inputs))[sequence[target]])
    return total


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3)])
def test_each_target_is_scored_once_in_its_own_window(params, context, stride):
    got, tokens = P.document_nll(
        MODEL, params, DOCUMENTS, 2, context=context, stride=stride, batches=DeviceBatches(ONE, 2)
    )
    assert tokens.tolist() == [len(d) for d in DOCUMENTS]
    np.testing.assert_allclose(got, [by_hand(params, [d], context, stride) for d in DOCUMENTS], rtol=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(params):
    nothing = jax.tree.map(jnp.zeros_like, params)
    nll, tokens = P.document_nll(MODEL, nothing, DOCUMENTS, 2, context=8, stride=8, batches=DeviceBatches(ONE, 4))
    assert math.exp(nll.sum() / tokens.sum()) == pytest.approx(23, rel=1e-6)


def test_a_number_that_is_not_finite_ends_the_evaluation_with_the_name_of_the_layer(params):
    broken = jax.tree.map(lambda w: w, params)
    out = broken["decoder"]["blocks"]["attn"]["o"]
    out["kernel"] = out["kernel"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(WorkError, match="the first layer with such outputs is layer 1 of the decoder"):
        P.document_nll(MODEL, broken, DOCUMENTS, 2, context=8, stride=8, batches=DeviceBatches(ONE, 4))


def test_the_batch_size_does_not_matter(params):
    some = [
        P.document_nll(MODEL, params, DOCUMENTS, 2, context=8, stride=4, batches=DeviceBatches(ONE, b))[0]
        for b in (1, 4)
    ]
    np.testing.assert_allclose(some[0], some[1], rtol=1e-6)


def test_units_by_hand():
    counts = P.count(["two words", "ein Wörtchen  mehr"], tokens=7)
    assert counts == P.Counts(tokens=7, words=5, bytes=9 + 19)
    got = P.metrics(28 * math.log(2), counts)
    assert got["bits_per_byte"] == pytest.approx(1.0)
    assert got["byte_perplexity"] == pytest.approx(2.0)
    assert got["perplexity"] == pytest.approx(2.0**4)
    assert got["word_perplexity"] == pytest.approx(2.0 ** (28 / 5))
    assert P.metrics(1e6, counts)["perplexity"] is None


def test_the_protocol_says_everything_that_the_number_depends_on():
    said = str(P.Protocol("test", 100, 512, 256))
    assert said == "test split, 100 documents each alone, context 512, stride 256, every token once, float32"
