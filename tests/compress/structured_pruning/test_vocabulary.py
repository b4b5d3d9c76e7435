"""Removal of tokens: the rows that stay give the same logits, and the most frequent tokens are chosen by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.structured_pruning import vocabulary
from llmctl.compress.structured_pruning.vocabulary import _most_frequent, _texts
from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig
from llmctl.data.tokenizers.vocabulary_subset import Vocabulary
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

KEPT = np.array([0, 1, 2, 5, 7, 8, 11])
SIZES = {
    "vocab_size": 14, "d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 8, "max_seq_len": 8,
}  # fmt: skip


@pytest.mark.parametrize(("family", "more"), [
    ("llama", {}), ("llama", {"tied": False}), ("bert", {}), ("t5", {"encoder_layers": 1}),
])  # fmt: skip
def test_logits_over_kept_tokens_are_those_before(family, more):
    cfg = ModelConfig.model_validate({"family": family, **SIZES, **more})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)
    small, cut = vocabulary.cut(cfg, params, KEPT)
    assert small.vocab_size == 7
    abstract = weights.flatten(functional.abstract(small))
    assert {p: a.shape for p, a in weights.flatten(cut).items()} == {p: a.shape for p, a in abstract.items()}
    if family == "bert":
        assert (-1,) in vocabulary.axes(cfg).values() and "lm_head/bias" in vocabulary.axes(cfg)

    def logits(cfg, params, tokens):
        batch = functional.example_batch(cfg, 1, 6)
        batch = {k: jnp.asarray(tokens) if k.endswith("tokens") else jnp.ones_like(v) for k, v in batch.items()}
        return np.asarray(functional.lm_logits(cfg, params, functional.hidden(cfg, params, batch)))

    new = np.random.default_rng(0).integers(0, 7, (1, 6))
    np.testing.assert_allclose(logits(small, cut, new), logits(cfg, params, KEPT[new])[..., KEPT], atol=1e-6)


class Letters(Vocabulary):
    """Tokens of letters; "abc" needs "ab", which needs nothing."""

    tokens = dict(enumerate(("<s>", "a", "b", "c", "ab", "abc", "x", "xyz", "d")))
    fixed = {0}

    def needed(self, i):
        return {i, *({4} if i == 5 else set())}

    def subset(self, kept):
        raise NotImplementedError


def test_the_most_frequent_tokens_stay_with_what_leads_to_them():
    counts_V = np.array([0, 1, 1, 1, 2, 9, 0, 5, 0])
    letters = [0, 1, 2, 3, 6]  # <s>, and the characters of used tokens: a b c, and x of xyz
    assert _most_frequent(Letters(), counts_V, {0}, 5) == letters
    assert _most_frequent(Letters(), counts_V, {0}, 6) == sorted([*letters, 7])  # abc would need two places
    assert _most_frequent(Letters(), counts_V, {0}, 7) == sorted([*letters, 4, 5])
    assert _most_frequent(Letters(), counts_V, {0}, 9) == list(range(9))
    with pytest.raises(RequestError, match="4 to keep, but special tokens, bytes and the characters of the data are 5"):
        _most_frequent(Letters(), counts_V, {0}, 4)


@pytest.mark.parametrize(("row", "expected"), [
    ({"prompt": "p{}", "choices": ["x", "y"], "answer": 1}, ["p{}", "x", "y"]),
    ({"tokens": ["a", "{}"], "tags": ["O", "B"]}, ["a {}"]),
    ({"prompt": "p{}", "completion": " c"}, [" c", "p{}"]),
    ({"text": "t{}", "label": "good"}, ["t{}"]),
])  # fmt: skip
def test_every_text_that_a_model_reads_is_counted_once(tmp_path, row, expected):
    lines = [json.dumps(row).replace("{}", str(n)) for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = _texts(DataConfig(source="jsonl", path=str(tmp_path / "rows.jsonl")), talks=False)
    assert sorted(found()) == sorted(text.format(n) for n in range(9) for text in expected)
