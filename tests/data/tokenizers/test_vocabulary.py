"""Test word boundaries and sentence ends for every kind of tokenizer."""

import numpy as np
import pytest

from llmctl.data.config import TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.vocabulary import Vocabulary

WORDS = ["the", "film", "was", "good", ".", '"', "was", "it", "?", '"', "yes", ",", "the", "end", ".", "the", "plot"]
TEXT = 'the film was good. "was it?" yes, the end.\nthe plot'


@pytest.fixture(scope="module", params=["unigram", "bytes", "wordpiece", "bytelevel"])
def words(request, sentences, tmp_path_factory):
    if request.param == "bytes":
        return Vocabulary(ByteTokenizer.new(sentinels=2))
    if request.param == "unigram":
        config = TokenizerConfig(vocab_size=300, sentinels=2)
        return Vocabulary(loading.train([*sentences, 'yes, it? it was, good! "good." it?'], config))
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>", "<extra_id_1>"]
    if request.param == "wordpiece":
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        backend.decoder = tokenizers.decoders.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([*sentences, TEXT], trainer)
    folder = tmp_path_factory.mktemp(request.param)
    backend.save(str(folder / "tokenizer.json"))
    return Vocabulary(loading.load(folder))


def test_special_tokens_are_neither_ordinary_nor_text(words):
    t = words.tokenizer
    special = {t.pad_id, t.bos_id, t.eos_id, t.mask_id, *t.sentinel_ids}
    assert len(special) == 6 and set(np.flatnonzero(words.special)) == special
    assert set(words.ordinary) == set(range(t.vocab_size)) - special - {t.unk_id}
    assert words.begins[sorted(special)].all() and words.closes[sorted(special)].all()


def test_words_begin_at_spaces_and_punctuation(words):
    ids = np.array(words.tokenizer.encode(TEXT))
    starts = words.begins[ids] | words.closes[np.append(words.tokenizer.bos_id, ids[:-1])]
    parts = np.split(ids, np.flatnonzero(starts)[1:])
    found = [words.tokenizer.decode(p.tolist()).replace(" ", "").strip() for p in parts]
    assert [w for f in found for w in ([*f] if set(f) <= set('."?') else [f]) if w] == WORDS


def test_sentences_end_at_stops(words):
    ids = np.array(words.tokenizer.encode(TEXT))
    ends = words.begins_sentence(ids[:-1], ids[1:])
    said = words.tokenizer.decode(ids[: np.flatnonzero(ends)[0] + 1].tolist())
    assert said.replace(" ", "") == "thefilmwasgood."


def test_a_mask_stands_for_a_word_and_its_space(words):
    t = words.tokenizer
    plain = t.encode("the film was good.")
    ids = t.encode_masked("the <mask> was good.")
    assert ids.count(t.mask_id) == 1 and t.decode(ids).replace(" ", "") == "thewasgood."
    at = ids.index(t.mask_id)
    assert ids[:at] == t.encode("the" if t.kind != "bytes" else "the ")
    # the text behind the mask is tokenized as without a mask
    assert ids[at + 1 :] == plain[len(plain) - (len(ids) - at - 1) :]
    assert t.encode_masked("<mask><mask>")[-2:] == [t.mask_id] * 2
    assert t.mask_id not in t.encode("the <mask> was good.")


@pytest.mark.parametrize("normalize", ["identity", "nfkc"])
@pytest.mark.parametrize(
    "parts",
    [
        ["我很喜欢这部电影！", "你觉得怎么样？", "它很好。", "真的吗？", "是的，非常好。"],
        ["この映画が好きです。", "本当に？", "はい、とても！", "また見たいです。"],
        ["यह फिल्म अच्छी है।", " मुझे पसंद आई।", " क्या आपने देखी?", " हाँ।"],
        ["هذا الفيلم جيد.", " هل شاهدته؟", " نعم شاهدته.", " كان رائعا!"],
        ["ฉันชอบหนังเรื่องนี้", " มันดีมาก", " คุณดูหรือยัง"],
        ["He said 3.5 is good.", " Yes!", " Is it?", " It is, e.g. here."],
    ],
    ids=["zh", "ja", "hi", "ar", "th", "en"],
)
def test_sentence_ends_in_other_scripts(parts, normalize, sentences):
    """NFKC maps full-width marks to ASCII. Chinese and Japanese write no space behind them."""
    text = "".join(parts)
    corpus = [*sentences, *[text, *parts] * 20]
    config = TokenizerConfig(vocab_size=316 if text.isascii() else 324, normalize=normalize)
    words = Vocabulary(loading.train(corpus, config))
    ids = np.array(words.tokenizer.encode(text))
    at = np.flatnonzero(words.begins_sentence(ids[:-1], ids[1:])) + 1
    found = [words.tokenizer.decode(part.tolist()) for part in np.split(ids, at)]
    right = [words.tokenizer.decode(words.tokenizer.encode(s)) for s in parts]
    if "e.g." in text:  # an abbreviation before a space looks like a sentence end
        assert [f.strip() for f in found] == [r.strip() for r in right[:-1]] + ["It is, e.g.", "here."]
    else:
        assert [f.strip() for f in found] == [r.strip() for r in right]
