"""Tokenizers with fewer tokens split texts of kept tokens as before."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmctl.config.errors import RequestError
from llmctl.data.config import TokenizerConfig
from llmctl.data.tokenizers import loading, vocabulary_subset
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.sentencepieces import SentencePieces
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer

WORDS = [
    f"{a}{b}{c}" for a in ("un", "re", "over", "") for b in ("load", "tie", "roll", "zebra") for c in ("ing", "s", "")
]
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) + f" {i}" for i in range(20)]
CORPUS = ["loading unrolls tie", "retie überload 3", "", "  rolling   the tie\n"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def made(kind):
    """Train a small tokenizer.json."""
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=SPECIAL, unk_token="<unk>")
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens(["<extra>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return JsonTokenizer(backend.to_str().encode())


def sentencepiece(kind):
    return loading.train(TEXTS, TokenizerConfig(kind=kind, vocab_size=320 if kind == "bpe" else 300, bos="no"))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "sp unigram", "sp bpe"])
def test_the_corpus_keeps_its_tokens(kind):
    old = sentencepiece(kind.split()[1]) if kind.startswith("sp") else made(kind)
    vocabulary = vocabulary_subset.of(old)
    used = {i for ids in old.encode_batch(CORPUS) for i in ids}
    needed = {i for text in CORPUS for i in vocabulary.on_the_way(text)}
    kept = sorted(set().union(*(vocabulary.needed(i) for i in used | vocabulary.fixed | needed)))
    assert len(kept) < old.vocab_size - 5
    model = vocabulary.subset(kept)
    new = SentencePieces(model, False) if kind.startswith("sp") else JsonTokenizer(model)
    assert new.vocab_size == len(kept)
    for text in CORPUS:
        assert [kept[i] for i in new.encode(text)] == old.encode(text), text
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    assert {t: kept[i] for t, i in new.special_ids.items()} == old.special_ids
    if kind == "bpe":
        content = json.loads(new.model)
        assert {t["id"] for t in content["added_tokens"]} == {0, 1, 2, 3, len(kept) - 1}
        assert all({a, b, a + b} <= content["model"]["vocab"].keys() for a, b in content["model"]["merges"])
        assert new.encode("zebra") != old.encode("zebra") and new.decode(new.encode("zebra")) == " zebra"
        assert isinstance(new, JsonTokenizer) and new.backend.encode("tie").ids == [2, *new.encode("tie"), 3]


def test_merges_on_the_way_to_a_token_stay():
    """By hand: l+o, lo+a, loa+d; "load" needs all, "ing" is left out with its merges."""
    vocab = ["<unk>", "</s>", *"loading", "lo", "loa", "load", "in", "ing"]
    vocab = list(dict.fromkeys(vocab))
    merges = [("l", "o"), ("i", "n"), ("lo", "a"), ("in", "g"), ("loa", "d")]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    vocabulary = vocabulary_subset.of(JsonTokenizer(backend.to_str().encode()))
    names = {vocab[i] for i in vocabulary.needed(vocab.index("load"))}
    assert names == {"l", "o", "a", "d", "lo", "loa", "load"}
    kept = sorted(vocab.index(t) for t in names | {"<unk>", "</s>"})
    content = json.loads(vocabulary.subset(kept))["model"]
    assert content["merges"] == [["l", "o"], ["lo", "a"], ["loa", "d"]] and len(content["vocab"]) == 9


def test_an_unknown_word_stays_unknown():
    """The parts that were found before the search failed stay; without "ab", "abx" would be a + ##bx."""
    vocab = {t: i for i, t in enumerate(("[UNK]", "[SEP]", "a", "ab", "##bx", "c"))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    old = JsonTokenizer(backend.to_str().encode())
    vocabulary = vocabulary_subset.of(old)
    assert old.encode("abx c") == [0, 5] and vocabulary.on_the_way("abx c") == {3}


def test_tokenizers_that_cannot_lose_tokens_are_refused():
    with pytest.raises(RequestError, match="of kind 'bytes' has bytes only"):
        vocabulary_subset.of(ByteTokenizer.new())
    backend = Tokenizer(models.BPE({"a</w>": 0, "</s>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(RequestError, match="BPE with marks at the ends of words cannot lose tokens"):
        vocabulary_subset.of(JsonTokenizer(backend.to_str().encode()))
