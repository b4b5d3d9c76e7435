"""Log-likelihoods of continuations: packed rows with shared contexts against each query alone, and shapes of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import WorkError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.batch_sizes import balanced
from llmctl.evaluate.likelihood import PackedRows, Query, ScoredSequence, Scorer, packed, rows_per_batch
from llmctl.evaluate.setup import Setup
from llmctl.model import functional
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "d_ff": 24, "vocab_size": 40}
MODELS = {
    "rotary": ModelConfig(preset="llama-tiny", max_seq_len=256, **SIZES),
    "learned": ModelConfig(preset="gpt2-tiny", max_seq_len=256, **(SIZES | {"kv_heads": 2})),
    "window": ModelConfig(preset="llama-tiny", max_seq_len=256, window=5, window_every=2, **SIZES),
    "relative": ModelConfig(
        preset="llama-tiny",
        max_seq_len=256,
        positions="relative",
        relative_buckets=8,
        relative_max_distance=16,
        **SIZES,
    ),
}


def setup(batch_size=2, seq_len=256, **axes):
    mesh = meshes.make(MeshConfig(**axes))
    return Setup(mesh, seq_len, seq_len, batch_size, "tail", "float32")


def random_params(model):
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    return jax.tree.map(lambda w: w * 4 if w.ndim > 1 else w, params)  # larger weights give larger differences


def questions():
    """Return queries with two to four continuations per context, with equal beginnings, and of one token."""
    rng = np.random.default_rng(0)
    found = []
    for count in (2, 4, 3, 2) * 3:
        context = rng.integers(3, 40, rng.integers(3, 30)).tolist()
        found += [Query(context, rng.integers(3, 40, rng.integers(1, 9)).tolist()) for _ in range(count)]
    found += [Query(found[0].context, [*found[0].continuation, 5]), Query(found[0].context, [7])]
    return found


def alone(model, params, queries):
    """Return the log-likelihood of each query from the logits of all its tokens, in a row of its own."""
    T = 40

    @jax.jit
    def log_p(tokens_BT, length_B):
        at_BT = jnp.arange(T) * jnp.ones_like(tokens_BT)
        batch = {"tokens": tokens_BT, "positions": at_BT, "segments": (at_BT < length_B[:, None]).astype(jnp.int32)}
        return jax.nn.log_softmax(functional.lm_logits(model, params, functional.hidden(model, params, batch)))

    whole = [[*q.context, *q.continuation] for q in queries]
    tokens = np.array([ids + [0] * (T - len(ids)) for ids in whole])
    found_BTV = np.asarray(log_p(tokens, np.array([len(ids) for ids in whole])))
    return [
        sum(found_BTV[b, i - 1, whole[b][i]] for i in range(len(q.context), len(whole[b])))
        for b, q in enumerate(queries)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_continuations_with_a_shared_context_score_as_if_each_were_alone(name):
    model, asked = MODELS[name], questions()
    params, settings = random_params(model), setup(**({"data": 2, "fsdp": 2, "tensor": 2} if name == "rotary" else {}))
    with meshes.use(settings.mesh):
        scorer = Scorer(model, params, settings)
        (rows,) = packed(scorer._sequences(asked), 256, 0)
        assert "branches" in rows.batch(np.arange(1))
        np.testing.assert_allclose([s.log_likelihood for s in scorer(asked)], alone(model, params, asked), atol=1e-4)


def test_a_context_is_packed_once_and_equal_inputs_are_not_repeated():
    sequence = ScoredSequence((1, 2, 3), {}, [])
    for query, continuation in enumerate(([4, 5], [6], [7], [4, 8], [9, 9, 9])):
        sequence.add(continuation, query)
    assert sequence.inputs == 3 + 1 + 2  # the branches [4] and [9, 9]; continuations of one token have no inputs
    batch = PackedRows([[sequence, sequence]], 16).batch(np.array([0]))
    assert batch["tokens"][0].tolist() == [1, 2, 3, 4, 9, 9] * 2 + [0] * 4
    assert batch["positions"][0, :6].tolist() == [0, 1, 2, 3, 3, 4]
    assert batch["branches"][0, :6].tolist() == [0, 0, 0, 1, 3, 3]
    assert batch["segments"][0].tolist() == [1] * 6 + [2] * 6 + [0] * 4
    real = batch["query"][0, :9].tolist()
    assert real == [0, 0, 1, 2, 3, 3, 4, 4, 4] and batch["at"][0, 9:12].tolist() == [8, 9, 8]
    assert batch["at"][0, :9].tolist() == [2, 3, 2, 2, 2, 3, 2, 4, 5]


def test_continuations_that_do_not_fit_one_row_get_the_context_again():
    model = MODELS["rotary"]
    scorer = Scorer(model, {}, setup(seq_len=16))
    found = scorer._sequences([Query([1] * 9, [k] * 5) for k in range(3, 6)])
    assert [s.inputs for s in found] == [13, 13, 13]
    assert [s.context for s in scorer._sequences([Query(range(40), [1, 2])])] == [tuple(range(25, 40))]


def test_long_texts_after_one_token_do_not_share_a_row_of_their_total_length():
    """Rolling windows of 30 documents begin after the start token; one row of 9,000 tokens took 20 times as long."""
    scorer = Scorer(MODELS["rotary"], {}, setup(seq_len=8192))
    documents = scorer._sequences([Query([1], [n] * 300) for n in range(2, 32)])
    assert [s.inputs for s in documents] == [300] * 30
    few_shot = scorer._sequences([Query([1] * 2000, [n] * 20) for n in range(2, 32)])
    assert [s.inputs for s in few_shot] == [2000 + 30 * 19]


def test_rows_have_few_lengths_and_little_padding():
    rng = np.random.default_rng(1)
    sizes = [*rng.integers(10, 60, 3000), *rng.integers(100, 400, 600), 900]
    sequences = [ScoredSequence((1,) * n, {(): n}, [(n - 1, 0, i)]) for i, n in enumerate(map(int, sizes))]
    found = packed(sequences, 2048, 8192)
    assert [rows.length for rows in found] == [1024, 256]
    slots = 0
    for rows in found:
        size = rows_per_batch(setup(32), rows)
        slots += -(-len(rows) // size) * size * rows.length
    assert sum(sizes) / slots > 0.97
    total = sum(int((rows.batch(np.arange(len(rows)))["query"] >= 0).sum()) for rows in found)
    assert total == len(sequences)
    # Few short sequences have no program of their own, and rows are not longer than needed.
    assert [rows.length for rows in packed(sequences[:20] + sequences[-3:], 2048, 8192)] == [1024]
    assert [(rows.length, len(rows)) for rows in packed(sequences[:2], 2048, 8192)] == [(128, 1)]
    assert packed([], 2048, 8192) == []


def test_batches_are_of_equal_size():
    assert [balanced(setup().mesh, 16, n) for n in (0, 1, 16, 17, 33, 47)] == [1, 1, 16, 9, 11, 16]
    assert [balanced(setup(data=4, fsdp=2).mesh, 16, n) for n in (3, 17, 33)] == [8, 16, 16]


def test_the_first_layer_with_a_number_that_is_not_finite_is_named():
    model = MODELS["rotary"]
    params = random_params(model)
    broken = dict(params)
    kernel = params["decoder"]["blocks"]["mlp"]["down"]["kernel"]
    broken["decoder"] = jax.tree.map(lambda a: a.at[1].set(jnp.nan) if a is kernel else a, params["decoder"])
    head = dict(params) | {"decoder": dict(params["decoder"])}
    head["decoder"]["norm"] = jax.tree.map(lambda a: a * jnp.nan, params["decoder"]["norm"])
    for wrong, line in ((broken, r"first .* is layer 1 of the decoder"), (head, "the output head makes it")):
        with pytest.raises(WorkError, match=line):
            Scorer(model, wrong, setup())(questions())
