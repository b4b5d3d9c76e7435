"""Compare objectives with rows computed by hand, and check the statistics of their random choices."""

import itertools

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data.corpus import tokenize
from llmctl.data.pretraining import next_sentence, span_corruption
from llmctl.data.pretraining.objective_rows import Objective, check, default
from llmctl.data.pretraining.objectives import masked, round_up_to_8
from llmctl.data.pretraining.packing import Packed
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.vocabulary import Vocabulary

PAD, BOS, EOS = 0, 2, 3
TEXTS = ["the film was very good. it ran too long, though.\nyes! " * (1 + i % 7) for i in range(40)]


@pytest.fixture(scope="module")
def words():
    return Vocabulary(ByteTokenizer.new(sentinels=40))


def packed(rows, tokens, segments=None):
    tokens = np.array(tokens, np.int32)
    segments = (tokens != PAD).astype(np.int32) if segments is None else np.array(segments, np.int32)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Packed(np.array(rows), tokens, tokens, tokens > 0, segments, places)


def rows_of(name, words, texts=TEXTS, seq_len=64, **kw):
    documents = tokenize(texts, words.tokenizer)
    options = {"seed": 3, "packing": "segments", "shuffle": True}
    return Objective(name, **kw).rows(documents, words.tokenizer, seq_len, **options)


# --- masked ----------------------------------------------------------------------------------------------------------


def test_masking_chooses_exactly_the_fraction_and_never_special_tokens(words):
    rng = np.random.default_rng(0)
    tokens = rng.integers(40, 200, (400, 80))
    tokens[:, 0], tokens[:, 59], tokens[:, 60:] = BOS, EOS, PAD
    batch = masked(packed(np.arange(400), tokens), words, rate=0.15)
    chosen = batch["weights"] > 0
    assert (chosen.sum(1) == 9).all()  # 15 % of 58 ordinary tokens is 8.7
    assert not chosen[:, [0, *range(59, 80)]].any()
    np.testing.assert_array_equal(batch["targets"][chosen], tokens[chosen])
    assert (batch["targets"][~chosen] == PAD).all()
    np.testing.assert_array_equal(batch["tokens"][~chosen], tokens[~chosen])
    shown = batch["tokens"][chosen]
    fractions = (shown == words.mask_id).mean(), (shown == tokens[chosen]).mean()
    assert fractions[0] == pytest.approx(0.8, abs=0.02) and fractions[1] == pytest.approx(0.1, abs=0.02)
    assert np.isin(shown[shown != words.mask_id], words.ordinary).all()
    # Every position is equally likely.
    assert chosen[:, 1:59].mean(0) == pytest.approx(np.full(58, 9 / 58), abs=0.08)


def test_places_hold_every_masked_token_in_a_static_number(words):
    batch = rows_of("masked", words).batch(np.arange(20))
    assert batch["places"].shape == (20, round_up_to_8(round(0.15 * 64))) == (20, 16)
    for row in range(20):
        places = batch["places"][row]
        assert len(set(places)) == 16 and (np.diff(places) > 0).all()
        assert batch["weights"][row][places].sum() == batch["weights"][row].sum() > 0


def test_a_row_is_a_function_of_its_number_and_the_seed(words):
    rows = rows_of("masked", words)
    whole, one = rows.batch(np.arange(9)), rows[7]
    for name in whole:
        np.testing.assert_array_equal(whole[name][7], one[name], err_msg=name)
    later = rows[7 + len(rows)]
    assert (later["weights"] != one["weights"]).any()
    tokens = np.full((1, 64), 50)
    draws = [masked(packed([7], tokens), words, seed=s)["weights"] for s in (0, 0, 1)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


def test_whole_words_are_masked_whole_and_nearly_as_often(words):
    # A word includes the space before it; punctuation is a separate word.
    parts = [" abc", " de", ",", " fghi", " jk", " lmnop", " q", "."] * 4
    tokens = [words.tokenizer.encode("".join(parts))] * 600
    batch = masked(packed(np.arange(600), tokens), words, whole_words=True)
    chosen = batch["weights"] > 0
    edges = np.cumsum([0, *map(len, parts)])
    for first, last in itertools.pairwise(edges):
        assert (chosen[:, first:last].sum(1) % (last - first) == 0).all(), (first, last)
    assert (chosen.sum(1) <= 15).all()  # 15 % of 100
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)


def test_a_tokenizer_without_a_mask_is_refused(letters):
    with pytest.raises(RequestError, match="mask"):
        rows_of("masked", Vocabulary(letters()), texts=["abc" * 30])


# --- spans -----------------------------------------------------------------------------------------------------------


def test_spans_golden():
    # A quarter of 8 tokens is dropped in spans of 1. The smallest numbers choose two of the seven gaps.
    dropped, starts = span_corruption.choose_spans(8, 0.25, 1.0, 0.5, np.array([9, 9, 1, 9, 9, 9, 0, 9]), np.arange(8))
    assert dropped.tolist() == starts.tolist() == [False, False, True, False, False, False, False, True]
    # One span of two tokens.
    dropped, starts = span_corruption.choose_spans(8, 0.25, 2.0, 0.5, np.array([9, 9, 9, 1, 9, 9, 9, 9]), np.arange(8))
    assert np.flatnonzero(dropped).tolist() == [3, 4] and np.flatnonzero(starts).tolist() == [3]
    # Four tokens are dropped in two spans, divided after the third.
    dropped, starts = span_corruption.choose_spans(
        8, 0.5, 2.0, 0.5, np.array([0, 9, 9, 1, 9, 9, 9, 9]), np.array([2, 1, 0, 9])
    )
    assert np.flatnonzero(dropped).tolist() == [0, 1, 2, 6] and np.flatnonzero(starts).tolist() == [0, 6]
    assert not span_corruption.choose_spans(1, 0.5, 1.0, 0.5, np.zeros(1), np.zeros(1))[0].any()


def test_corruption_golden(words, monkeypatch):
    S = words.tokenizer.sentinel_ids
    chosen = {6: [[1, 2], [4]], 3: []}

    def choose(n, *_):
        dropped, starts = np.zeros(n, bool), np.zeros(n, bool)
        for span in chosen[n]:
            dropped[span], starts[span[0]] = True, True
        return dropped, starts

    monkeypatch.setattr(span_corruption, "choose_spans", choose)
    given = packed([0], [[BOS, 11, 12, 13, 14, 15, 16, EOS, 21, 22, 23, PAD]], [[1] * 8 + [2] * 3 + [0]])
    batch = span_corruption.corrupted(given, words, 12, 8)
    expected = {
        "encoder_tokens": [BOS, 11, S[0], 14, S[1], 16, EOS, 21, 22, 23, PAD, PAD],
        "encoder_segments": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0],
        "encoder_positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0],
        "targets": [S[0], 12, 13, S[1], 15, EOS, PAD, PAD],
        "tokens": [PAD, S[0], 12, 13, S[1], 15, PAD, PAD],
        "segments": [1, 1, 1, 1, 1, 1, 0, 0],
        "positions": [0, 1, 2, 3, 4, 5, 0, 0],
        "weights": [1, 1, 1, 1, 1, 1, 0, 0],
    }
    assert {name: values[0].tolist() for name, values in batch.items()} == expected
    # The second sentinel does not fit into the encoder, so its span is not predicted.
    cut = span_corruption.corrupted(given, words, 4, 8)
    assert cut["encoder_tokens"][0].tolist() == [BOS, 11, S[0], 14]
    assert cut["targets"][0].tolist() == [S[0], 12, 13, EOS, PAD, PAD, PAD, PAD]


def test_corruption_drops_the_fraction_in_spans_of_the_mean_length_and_loses_nothing(words):
    rows = rows_of("spans", words, texts=["abcdefgh ij klm nop" * 40] * 5, seq_len=128)
    raw, decoder, _ = span_corruption.sizes(128, 0.15, 3.0)
    assert (raw, decoder) == (142, 40)  # 21 of 142 tokens in 7 spans leave 128
    batch = rows.batch(np.arange(200))
    source = rows.packed(np.arange(200))
    S = set(words.tokenizer.sentinel_ids)
    dropped = inserted = whole = 0
    for b in range(200):
        if len(np.unique(source.segments[b])) > 1:
            continue
        encoder = batch["encoder_tokens"][b][batch["encoder_segments"][b] > 0].tolist()
        targets = batch["targets"][b][batch["weights"][b] > 0].tolist()
        answers, last = {}, None
        for t in targets:
            if t in S:
                answers[last := t] = []
            elif t != EOS:
                answers[last].append(t)
        # Inserting the spans restores the document.
        assert [x for t in encoder for x in (answers[t] if t in S else [t])] == source.tokens[b].tolist()
        whole += 1
        dropped += sum(map(len, answers.values()))
        inserted += len(answers)
    assert whole > 100 and dropped / (whole * 142) == pytest.approx(0.15, abs=0.003)
    assert dropped / inserted == pytest.approx(3.0, abs=0.1)
    assert (batch["encoder_segments"] > 0).mean() > 0.98
    one = rows[150]
    assert all((one[name] == batch[name][150]).all() for name in one)


def test_prefix_divides_every_document_in_two(words):
    rows = rows_of("prefix", words, texts=["abcdefghij" * 3] * 50, seq_len=32)
    batch, source = rows.batch(np.arange(300)), rows.packed(np.arange(300))
    shares = []
    for b in range(300):
        for s in np.unique(source.segments[b]):
            head = batch["encoder_tokens"][b][batch["encoder_segments"][b] == s].tolist()
            tail = batch["targets"][b][batch["segments"][b] == s].tolist()
            document = source.tokens[b][source.segments[b] == s].tolist()
            if len(document) > 1:
                assert head + tail == document and head and tail
                assert batch["tokens"][b][batch["segments"][b] == s].tolist() == [PAD, *tail[:-1]]
                shares += [len(head) / len(document)] * (len(document) == 32)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06) and np.std(shares) == pytest.approx(0.29, abs=0.05)


# --- pairs -----------------------------------------------------------------------------------------------------------


def pairs(words, texts, seq_len=40, **kw):
    return rows_of("next_sentence", words, texts=texts, seq_len=seq_len, **kw)


def unmasked(batch):
    return np.where(batch["weights"] > 0, batch["targets"], batch["tokens"])


def test_pairs_are_consecutive_sentences_or_of_two_documents(words):
    # Every document consists of its own letter.
    texts = [". ".join([c * 6] * 20) for c in "abcdefghijklmnop"]
    batch = pairs(words, texts).batch(np.arange(600))
    tokens, label = unmasked(batch), batch["next_label"]
    assert (label == 0).sum() == (label == 1).sum() > 250
    decode = words.tokenizer.decode
    for row, types, segments, is_next in zip(tokens, batch["types"], batch["segments"], label < 1, strict=True):
        a, b = row[(segments > 0) & (types == 0)], row[types == 1]
        assert a[0] == BOS and a[-1] == EOS == b[-1] and (row[segments == 0] == PAD).all()
        first, second = decode(a), decode(b)
        assert first.endswith(".") and second.startswith(" ")
        assert (set(first) - set(" .") == set(second) - set(" .")) == is_next
        assert len(first) <= 19 and len(second) <= 18


def test_every_passage_is_true_as_often_as_false_in_the_same_four_rows(words):
    texts = [". ".join([c * 6] * 20) for c in "abcdefghijklmnop"]
    batch = pairs(words, texts).batch(np.arange(400))
    label, types, tokens = batch["next_label"], batch["types"], batch["tokens"]  # values after masking
    sides = [{t: bytes(row[where == t]) for t in (0, 1)} for row, where in zip(tokens, types, strict=True)]
    whole = 0
    for g in range(0, 400, 4):
        if (label[g : g + 4] == -1).all():  # two passages without a partner
            continue
        assert label[g : g + 4].tolist() == [0, 0, 1, 1]
        firsts, seconds = ([sides[g + k][t].rstrip(b"\0") for k in range(4)] for t in (0, 1))
        assert firsts[:2] == firsts[2:] and seconds[:2] == seconds[:1:-1] and firsts[0] != firsts[1]
        whole += 1
    assert whole > 80
    for row, places in zip(batch["weights"], batch["places"], strict=True):
        assert set(np.flatnonzero(row)) <= set(places) and 1 <= row.sum() <= 0.15 * 38 + 1


def test_a_true_pair_is_one_passage(words):
    text = " ".join(f"{i} x{i}." for i in range(60))
    rows = pairs(words, [text, text.replace("x", "y")], seq_len=64)
    batch = rows.batch(np.arange(100))
    decode = words.tokenizer.decode
    for row, types in zip(unmasked(batch)[batch["next_label"] == 0], batch["types"], strict=False):
        assert decode(row) in text or decode(row) in text.replace("x", "y"), types
    later = rows.batch(np.arange(100) + len(rows))
    assert (later["tokens"] != batch["tokens"]).any()


def test_lengths_do_not_tell_the_label(words):
    batch = pairs(words, TEXTS, seq_len=48).batch(np.arange(3000))
    length, label = batch["types"].sum(1), batch["next_label"]
    guess = np.array([round(label[(length == n) & (label >= 0)].mean()) for n in range(49) if (length == n).any()])
    known = {n: guess[i] for i, n in enumerate(n for n in range(49) if (length == n).any())}
    right = np.mean([known[n] == y for n, y in zip(length, label, strict=True) if y >= 0])
    assert right < 0.58


def test_a_document_of_one_sentence_has_masks_and_no_pair(words):
    batch = pairs(words, ["one sentence only.", "another one here"]).batch(np.arange(8))
    assert (batch["next_label"] == -1).all() and (batch["types"] == 0).all() and (batch["weights"].sum(1) > 0).all()
    assert {words.tokenizer.decode(t) for t in unmasked(batch)} == {"one sentence only.", "another one here"}


def test_labels_are_balanced_by_construction_and_few_pairs_are_refused(words):
    """A constant prediction is right in half of the labeled rows, even if most documents have one sentence."""
    texts = [". ".join([c * 6] * (1 + (i % 3 == 0))) + "." for i, c in enumerate("abcdefghijklmnopqrstuvwxyz" * 8)]
    rows = pairs(words, texts)
    label = rows.batch(np.arange(320))["next_label"]
    for g in range(0, 320, 16):
        assert (label[g : g + 16] == 0).sum() == (label[g : g + 16] == 1).sum()
    shared = (label >= 0).mean()
    assert 0.2 < shared <= 0.34 and rows.labelled == pytest.approx(shared, abs=0.08)
    next_sentence.check(rows.labelled)
    for few in (["ab cd. " * 30], ["one sentence only.", "another one here"]):  # no other document; no second sentence
        found = pairs(words, few)
        assert (found.batch(np.arange(20))["next_label"] == -1).all() and found.labelled == 0
        with pytest.raises(RequestError, match=r"0\.0% of the rows have one.*objective = 'masked'"):
            next_sentence.check(found.labelled)


def test_rows_do_not_depend_on_the_batch_that_they_are_built_in(words):
    rows = pairs(words, [". ".join([c * 6] * (1 + i % 3)) + "." for i, c in enumerate("abcdefghijklmnop")])
    whole = rows.batch(np.arange(64))
    for some in ([5], [40, 3, 17, 3], [63, 0]):
        part = rows.batch(np.array(some))
        assert all((part[name] == whole[name][some]).all() for name in whole)


def test_validation_pairs_are_in_order_and_the_same_every_time(words):
    documents = tokenize(TEXTS, words.tokenizer)
    options = {"seed": 0, "packing": "segments", "shuffle": False}
    rows = [Objective("next_sentence").rows(documents, words.tokenizer, 40, **options) for _ in range(2)]
    a, b = (r.batch(np.arange(len(r))) for r in rows)
    assert all((a[name] == b[name]).all() for name in a)
    assert rows[0][5]["tokens"].tolist() == a["tokens"][5].tolist()
    assert 0 < rows[0].waste < 0.6


# --- which objective is for whom -----------------------------------------------------------------------------------


def test_objectives_belong_to_architectures():
    assert default("decoder", False) == "causal" and default("encoder", False) == "masked"
    assert default("encoder", True) == "next_sentence" and default("encoder_decoder", False) == "spans"
    check("masked", "encoder", True)
    with pytest.raises(RequestError, match=r"objective 'spans' is not for .* 'encoder': masked"):
        check("spans", "encoder", False)
    with pytest.raises(RequestError, match=r"model\.next_sentence"):
        check("next_sentence", "encoder", False)


def test_spans_need_sentinels():
    bare = Vocabulary(ByteTokenizer.new())
    with pytest.raises(RequestError, match="sentinels"):
        rows_of("spans", bare)
