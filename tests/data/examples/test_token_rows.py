"""Compare rows of words, answers and text pairs with rows computed by hand, for every kind of tokenizer."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.examples.extractive_qa import AnswerRows, token_span
from llmctl.data.examples.text_pairs import TwoTextRows
from llmctl.data.examples.token_labels import TagRows, first_tokens
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer

BOS, EOS = 2, 3


@pytest.fixture
def load(tmp_path):
    def loaded(rows, **kw):
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return splits.load(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), validation=0, test=0, **kw))[
            "train"
        ]

    return loaded


@pytest.fixture(scope="module")
def wordpiece():
    vocab = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "the", "cat", "##s", "sat", ",", "li", "##ly")
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return JsonTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def byte_level():
    made = Tokenizer(
        models.BPE({"</s>": 0, "t": 1, "h": 2, "th": 3, "Ġ": 4, "Ġth": 5, "Ã": 6, "«": 7}, [("t", "h"), ("Ġ", "th")])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return JsonTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def pieces():
    words = loading.train(["the cat sat on the mat. " * 3, "hello world 12"] * 20, TokenizerConfig(vocab_size=280))
    assert words.kind == "sentencepiece"
    return words


def test_spans_of_every_kind_of_tokenizer(wordpiece, byte_level, pieces):
    assert wordpiece.encode_spans(["The  cats, é"])[0][1].tolist() == [[0, 3], [5, 8], [8, 9], [9, 10], [11, 12]]
    # Surrounding white space is no part of a span, and every byte of a character has the character's span.
    ids, spans = byte_level.encode_spans(["th thë"])[0]
    assert ids.tolist() == [3, 5, 6, 7] and spans.tolist() == [[0, 2], [3, 5], [5, 6], [5, 6]]
    assert ByteTokenizer.new().encode_spans(["aë b"])[0][1].tolist() == [[0, 1], [1, 2], [1, 2], [3, 3], [3, 4]]
    text = "the  cat hëllo 日本 "
    ids, spans = pieces.encode_spans([text])[0]
    assert ids.tolist() == pieces.encode(text)
    shown = [text[a:b] for a, b in spans]
    assert shown[0] == "" and shown.count("ë") == 2 and shown.count("日") == 3 and shown.count("本") == 3
    assert "".join(text[a:b] for a, b in dict.fromkeys(map(tuple, spans.tolist()))) == text.replace(" ", "")
    assert pieces.encode_spans([""])[0][1].shape == (0, 2)


def test_a_normalizer_that_changes_lengths_keeps_characters_in_place():
    words = loading.train(
        ["the cat sat on the mat. " * 3, "hello world 12"] * 20,
        TokenizerConfig(kind="bpe", vocab_size=280, normalize="nfkc"),
    )
    text = "ﬁne ½ cat"
    spans = words.encode_spans([text])[0][1]
    at = token_span(spans, text.index("cat"), len(text))
    assert at and words.decode(words.encode(text)[at[0] : at[1] + 1]).strip() == "cat"
    half = token_span(spans, 4, 5)
    assert half and half[1] > half[0] and {tuple(s) for s in spans[half[0] : half[1] + 1].tolist()} == {(4, 5)}


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "pieces"])
def test_words_begin_at_their_first_token(kind, wordpiece, pieces):
    words = {"wordpiece": wordpiece, "bytes": ByteTokenizer.new(), "pieces": pieces}[kind]
    given = ["The", "cats", "", "lily", ",", "sat"]
    text = " ".join(given)
    ids, spans = words.encode_spans([text])[0]
    at = first_tokens(given, spans)
    assert at[2] == -1
    starts = np.cumsum([0, *(len(w) + 1 for w in given[:-1])])
    for w in (0, 1, 3, 4, 5):
        assert spans[at[w]][0] == starts[w] and spans[at[w]][1] > starts[w]
        assert not any(a <= starts[w] < b for a, b in spans[: at[w]])
    if kind == "wordpiece":  # pieces: the cat ##s li ##ly , sat
        assert ids.tolist() == [4, 5, 6, 9, 10, 8, 7] and at.tolist() == [0, 1, -1, 3, 5, 6]


def test_a_token_shared_by_two_words_is_the_first_ones():
    spans = np.array([[0, 5], [6, 8]])  # "ab cd ef", in which the first two words are one token
    assert first_tokens(["ab", "cd", "ef"], spans).tolist() == [0, -1, 1]


TAGGED = [
    {"tokens": ["the", "cats", "lily"], "tags": ["O", "B-X", "I-X"]},
    {"tokens": ["sat", ","], "tags": ["O", "O"]},
]


def test_tag_rows_golden(load, wordpiece):
    examples = load(TAGGED)
    assert examples.classes == ("B-X", "I-X", "O") and list(examples.texts()) == ["the cats lily", "sat ,"]
    wordpiece.add_bos = True
    rows = TagRows(examples, wordpiece, 8, shuffle=False)
    batch = rows.batch(np.arange(2))
    assert batch["tokens"].tolist() == [[1, 4, 5, 6, 9, 10, 2, 3], [1, 7, 8, 2, 3, 3, 3, 3]]
    assert batch["segments"].sum(1).tolist() == [7, 4]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[0, 2, 0, 0, 1, 0, 0, 0], [0, 2, 2, 0, 0, 0, 0, 0]]
    assert (rows.words, rows.cut) == (5, 0)
    short = TagRows(examples, wordpiece, 5, shuffle=False)
    assert short[0]["tokens"].tolist() == [1, 4, 5, 6, 2] and short[0]["weights"].sum() == 2 and short.cut == 1
    wordpiece.add_bos = False


def test_tags_that_are_numbers_and_tags_that_do_not_fit(load, wordpiece):
    assert load([{"tokens": ["a", "b"], "tags": [3, 10]}]).classes == ("3", "10")
    with pytest.raises(RequestError, match=r"x.jsonl:1: column 'tags' must hold one label a word \(1 for 2 words\)"):
        load([{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(RequestError, match="'B-Y' is not among"):
        load([{"tokens": ["a"], "tags": ["B-Y"]}], classes=["O", "B-X"])
    with pytest.raises(RequestError, match="is no list of words"):
        load([{"tokens": "a b", "tags": ["O"]}])
    with pytest.raises(RequestError, match="a label a row and a tag a word"):
        load([{"tokens": ["a"], "tags": ["O"], "label": "x"}])
    with pytest.raises(RequestError, match=r'no column "tokens"'):
        TagRows(load([{"text": "a"}]), wordpiece, 8)
    # Without tags, `tokens` may be anything, such as a count, so it is not used unless it is mapped.
    assert load([{"text": "a", "tokens": 7, "label": "x"}]).columns == ("text", "label")


def test_words_are_cleaned_as_texts_are(load):
    rows = [{"tokens": ["a\u00a0b", "c\ud83d"], "tags": ["O", "X"]}]
    examples = load(rows, replace={"\u00a0": " ", "c": "d"})
    assert examples[0]["tokens"] == ["a b", "d\ufffd"] and examples[0]["text"] == "a b d\ufffd"


def asked(context, question, *answers):
    found = {"text": [t for t, _ in answers], "answer_start": [s for _, s in answers]}
    return {"id": 1, "question": question, "context": context, "answers": found}


def test_answer_rows_golden(load, letters):
    examples = load([asked("cdef", "ab", ("de", 1), ("f", 3)), asked("gh", "a")])
    assert examples.columns[0] == "context"  # a passage is in one split for all of its questions
    batch = AnswerRows(examples, letters(add_bos=True), 10, shuffle=False).batch(np.arange(2))
    assert batch["tokens"].tolist() == [[BOS, 4, 5, EOS, 6, 7, 8, 9, EOS, 0], [BOS, 4, EOS, 10, 11, EOS, 0, 0, 0, 0]]
    assert batch["types"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["among"].tolist() == [[1, 0, 0, 0, 1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["first"].tolist()[0] == [0, 0, 0, 0, 0, 1, 2, 3, 0, 0]
    assert batch["last"].tolist()[0] == [0, 0, 0, 0, 1, 2, 3, 4, 0, 0]
    assert (batch["start"].tolist(), batch["end"].tolist(), batch["example"].tolist()) == ([5, 0], [6, 0], [0, 1])
    assert batch["segments"].sum(1).tolist() == [9, 6] and batch["positions"][0].tolist() == [*range(9), 0]


def test_long_contexts_are_read_in_windows_that_overlap_by_half(load, letters):
    # 9 tokens per row: bos, a, eos, 5 of the context, eos. Windows begin at 0, 3 and 6.
    rows = AnswerRows(load([asked("bcdefghijk", "a", ("gh", 5))]), letters(add_bos=True), 9, shuffle=False)
    batch = rows.batch(np.arange(len(rows)))
    shown = [letters().decode(t[(t > 3)])[1:] for t in batch["tokens"]]
    assert shown == ["bcdef", "efghi", "hijk"]
    # Only the second window contains all of "gh".
    assert batch["start"].tolist() == [0, 5, 0] and batch["end"].tolist() == [0, 6, 0]
    assert batch["first"][2].tolist() == [0, 0, 0, 6, 7, 8, 9, 0, 0]
    # A long question takes half of the room.
    row = AnswerRows(load([asked("bcd", "aaaaaaaaaa", ("d", 2))]), letters(add_bos=True), 9, shuffle=False)[0]
    assert row["tokens"].tolist() == [BOS, 4, 4, 4, EOS, 5, 6, 7, EOS] and row["start"] == row["end"] == 7


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "pieces"])
def test_answers_are_found_again_from_their_tokens(kind, load, wordpiece, pieces):
    words = {"wordpiece": wordpiece, "bytes": ByteTokenizer.new(), "pieces": pieces}[kind]
    context = "the cats, é  lily sat the"
    for answer in ("cats", "é  lily", "the cats", "sat"):
        rows = AnswerRows(load([asked(context, "cat", (answer, context.index(answer)))]), words, 64, shuffle=False)
        row = rows[0]
        assert row["start"] > 0
        assert context[row["first"][row["start"]] : row["last"][row["end"]]] == answer


def test_answers_that_do_not_stand_there_are_refused(load):
    for start, said in ((0, "character 0"), (-3, "character -3"), (9, "character 9")):
        with pytest.raises(RequestError, match=f"x.jsonl:1: the answer 'de' does not stand at {said}"):
            load([asked("cdef", "ab", ("de", start))])
    with pytest.raises(RequestError, match="must read"):
        load([{"question": "a", "context": "b", "answers": "b"}])
    assert load([{"question": "a", "context": "b", "answers": None}])[0]["answers"] == []


def test_two_texts_golden(load, letters):
    rows = TwoTextRows(load([{"text": "ab", "pair": "cdefg"}]), letters(add_bos=True), 5, shuffle=False)
    batch = rows.batch(np.arange(1))
    assert batch["tokens"].tolist() == [[BOS, 4, 5, EOS, 0]] and batch["pair_tokens"].tolist() == [[BOS, 6, 7, 8, EOS]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 0]] and batch["pair_positions"].tolist() == [[0, 1, 2, 3, 4]]
    assert "label" not in batch
    scored = load([{"text": "ab", "pair": "c", "label": 0.5}], label_type="number")
    assert TwoTextRows(scored, letters(), 5)[0]["label"] == np.float32(0.5)
    with pytest.raises(RequestError, match="label_type"):
        TwoTextRows(load([{"text": "ab", "pair": "c", "label": "x"}]), letters(), 5)
