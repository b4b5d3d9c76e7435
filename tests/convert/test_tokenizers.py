"""Import and export of tokenizers: SentencePiece as tokenizer.json, older vocabularies, other libraries."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from llmctl.config.errors import RequestError
from llmctl.convert import post_processor, sentencepiece_json, tokenizer_export, tokenizers
from llmctl.data.config import TokenizerConfig
from llmctl.data.examples.labelled import templated
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.base import TextTemplate
from llmctl.model.config import ModelConfig

SYLLABLES = ("ka", "mo", "ri", "ten", "lu", "san", "pe", "do", "shi", "ver", "gal", "nim")
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES[::2]] + ["the", "cat", "sat", "on", "12", "345", ",", "it's"]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 30)) + f" {i}." for i in range(200)]
NEW = ["The cat sang 345 songs!", "naïve — 你好\n  two  spaces", "moonsmat"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("normalize", ["identity", "nfkc_lowercase"])
def test_our_tokenizers_go_out_as_transformers_reads_them(kind, normalize, tmp_path):
    words = loading.train(TEXTS, TokenizerConfig(kind=kind, vocab_size=310, normalize=normalize, sentinels=3))
    words.save(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    model = ModelConfig(vocab_size=words.vocab_size, labels=2, head="classify" if kind == "bpe" else "lm")
    ids = tokenizer_export.export_tokenizer(tmp_path / "ours", tmp_path / "theirs", model).ids
    assert ids == {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in NEW:
        expected = words.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == expected
        assert theirs.decode(expected) == words.decode(expected)
        # what their programs give a model begins and ends as what it was trained on
        assert theirs.encode(text) == [*words.prompt(text), *[words.eos_id] * (kind == "bpe")]
    assert theirs.eos_token_id == words.eos_id
    again = loading.load(tmp_path / "theirs")
    assert again.prompt(NEW[1]) == words.prompt(NEW[1]) != words.encode(NEW[1])
    assert (again.mask_id, again.sentinel_ids) == (words.mask_id, words.sentinel_ids)


def test_a_conversion_that_cuts_otherwise_is_not_written(tmp_path, monkeypatch):
    words = loading.train(TEXTS, TokenizerConfig(vocab_size=310))
    monkeypatch.setattr(sentencepiece_json, "SAMPLES", ("the cat",))
    monkeypatch.setattr(type(words), "encode", lambda self, text: [1])
    assert sentencepiece_json.convert(words) is None


def test_vocabularies_of_older_folders(tmp_path):
    # a line separator is a token like others
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", "the", "cat", "##s", "sat", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", "utf-8")
    cfg = ModelConfig(vocab_size=len(vocab))
    out = tokenizers.import_tokenizer(tmp_path, tmp_path / "out", cfg)
    words = loading.load(out)
    assert words.encode("The cats sat.") == [6, 7, 8, 9, 10]
    assert (words.bos_id, words.eos_id, words.mask_id) == (2, 3, 4)
    theirs = transformers.BertTokenizer({t: i for i, t in enumerate(vocab)})
    assert [*words.prompt("The cats sat."), words.eos_id] == theirs.encode("The cats sat.")
    row, types = templated(words.template, *(np.array(words.encode(t)) for t in ("The cats", "sat.")), seq_len=16)
    pair = theirs("The cats", "sat.")
    assert (row.tolist(), types.tolist()) == (pair["input_ids"], pair["token_type_ids"])
    with pytest.raises(RequestError, match="11 tokens and the model's table 99 rows"):
        tokenizers.import_tokenizer(tmp_path, tmp_path / "out", cfg.model_copy(update={"vocab_size": 99}))
    (tmp_path / "vocab.txt").unlink()
    assert tokenizers.import_tokenizer(tmp_path, tmp_path / "out", cfg) is None
    letters = {"<s>": 0, "</s>": 1, "c": 2, "a": 3, "t": 4, "ca": 5, "cat": 6, "Ġ": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    words = loading.load(tokenizers.import_tokenizer(tmp_path, tmp_path / "bpe", ModelConfig(vocab_size=8)))
    assert words.encode("cat cat") == [6, 7, 6]
    assert words.prompt("cat") == [0, 6]  # RoBERTa's; GPT-2 has no <s>
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    words = loading.load(tokenizers.import_tokenizer(tmp_path, tmp_path / "gpt", ModelConfig(vocab_size=2)))
    assert words.prompt("a") == [1]


def test_padding_and_truncation_of_a_file_are_no_part_of_its_template(tmp_path):
    # Files of sentence-transformers pad every text to 128 tokens and cut longer ones.
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}
    made = Backend(models.WordLevel(ids, unk_token="[UNK]"))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=128, pad_token="[PAD]")
    made.enable_truncation(2)
    expected = TextTemplate((2,), (3,), (3,))
    assert post_processor.read(made, {}, {}) == expected
    assert made.padding and made.truncation  # the tokenizer itself is unchanged
    made.save(str(tmp_path / "tokenizer.json"))
    cfg = ModelConfig(vocab_size=5, family="bert", head="embed", next_sentence=False)
    words = loading.load(tokenizers.import_tokenizer(tmp_path, tmp_path / "out", cfg))
    assert words.template.row(words.encode("a")).tolist() == [2, 4, 3]


def test_added_tokens_are_not_dropped(tmp_path):
    words = loading.train(TEXTS, TokenizerConfig(vocab_size=310))
    (tmp_path / "tokenizer.model").write_bytes(words.model)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 2, "<|im_start|>": 310}))
    with pytest.raises(RequestError, match=r"added tokens \(<\|im_start\|>\) are only read from a tokenizer.json"):
        tokenizers.import_tokenizer(tmp_path, tmp_path / "out", ModelConfig(vocab_size=311))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 2}))
    assert tokenizers.import_tokenizer(tmp_path, tmp_path / "out", ModelConfig(vocab_size=311))


def test_settings_of_older_folders(tmp_path):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "é", "e", "中国", "中", "国"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", "utf-8")
    cfg = ModelConfig(vocab_size=len(vocab))
    found = {}
    for said in ({}, {"strip_accents": False}, {"tokenize_chinese_chars": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        found[str(said)] = loading.load(tokenizers.import_tokenizer(tmp_path, tmp_path / str(len(found)), cfg)).encode(
            "É 中国"
        )
        theirs = transformers.BertTokenizer({t: i for i, t in enumerate(vocab)}, **said)
        assert found[str(said)] == theirs.encode("É 中国", add_special_tokens=False)
    assert list(found.values()) == [[6, 8, 9], [5, 8, 9], [6, 7]]
