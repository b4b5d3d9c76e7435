"""Compare labeled rows and completion rows with rows computed by hand."""

import json

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.data.examples.completions import CompletionRows, SequencePairRows
from llmctl.data.examples.labelled import ClassificationRows

BOS, EOS = 2, 3


@pytest.fixture
def train(tmp_path):
    def load(rows, **kw):
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return splits.load(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), validation=0, test=0, **kw))[
            "train"
        ]

    return load


LABELLED = [{"text": "ab", "label": "y"}, {"text": "abcdefgh", "label": "x"}, {"text": "c", "label": "y"}]


def test_classification_golden(train, letters):
    rows = ClassificationRows(train(LABELLED), letters(add_bos=True), 6, shuffle=False)
    batch = rows.batch(np.arange(3))
    np.testing.assert_array_equal(
        batch["tokens"], [[BOS, 4, 5, EOS, 0, 0], [BOS, 4, 5, 6, 7, EOS], [BOS, 6, EOS, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 0, 0], range(6), [0, 1, 2, 0, 0, 0]])
    assert batch["label"].tolist() == [1, 0, 1]
    assert rows.classes == ("x", "y")
    assert {a.dtype for a in batch.values()} == {np.dtype(np.int32)}
    assert rows[4]["label"] == 0


def test_head_and_tail_of_long_texts(train, letters):
    # Room for 4 tokens (bos and eos stay) and for 5: the odd token goes to the head.
    for seq_len, kept in ((6, [4, 5, 10, 11]), (7, [4, 5, 6, 10, 11])):
        rows = ClassificationRows(train(LABELLED), letters(True), seq_len, truncate="head_tail", shuffle=False)
        assert rows[1]["tokens"].tolist() == [BOS, *kept, EOS]


def test_each_epoch_has_every_example_in_its_own_order(train, letters):
    examples = train([{"text": "a" * n, "label": n} for n in range(1, 21)], label_type="number")
    rows = ClassificationRows(examples, letters(), 32, seed=4)
    orders = [rows.batch(np.arange(e * 20, e * 20 + 20))["label"].tolist() for e in range(3)]
    assert all(sorted(o) == list(range(1, 21)) for o in orders)
    assert orders[0] != orders[1] != orders[2]
    straddling = rows.batch(np.arange(15, 25))["label"].tolist()
    assert straddling == orders[0][15:] + orders[1][:5]
    assert [rows[i]["label"] for i in (19, 3, 45)] == [orders[0][19], orders[0][3], orders[2][5]]
    assert rows[0]["label"].dtype == np.float32


def test_completions_golden(train, letters):
    pairs = [{"prompt": "abc", "completion": "de"}, {"prompt": "abcdef", "completion": "gh"},
             {"prompt": "ab", "completion": "cdefghij"}]  # fmt: skip
    rows = CompletionRows(train(pairs), letters(True), 6, shuffle=False)
    # Expected row: ^ a b c | d e .
    assert rows[0]["tokens"].tolist() == [BOS, 4, 5, 6, 7, 8]
    assert rows[0]["targets"].tolist() == [4, 5, 6, 7, 8, EOS]
    assert rows[0]["weights"].tolist() == [0, 0, 0, 1, 1, 1]
    # The beginning of the prompt is cut: ^ d e f | g h .
    assert rows[1]["tokens"].tolist() == [BOS, 7, 8, 9, 10, 11]
    assert rows[1]["targets"].tolist() == [7, 8, 9, 10, 11, EOS]
    # The completion alone is too long, so one prompt token stays: ^ b | c d e f g (cut).
    assert rows[2]["tokens"].tolist() == [BOS, 5, 6, 7, 8, 9]
    assert rows[2]["targets"].tolist() == [5, 6, 7, 8, 9, 10]
    assert rows[2]["weights"].tolist() == [0, 1, 1, 1, 1, 1]


def test_completions_are_padded(train, letters):
    row = CompletionRows(train([{"prompt": "a", "completion": "b"}]), letters(), 5, shuffle=False)[0]
    assert row["tokens"].tolist() == [4, 5, 0, 0, 0]
    assert row["targets"].tolist() == [5, EOS, 0, 0, 0]
    assert row["weights"].tolist() == [1, 1, 0, 0, 0]
    assert row["segments"].tolist() == [1, 1, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 0, 0, 0]


def test_rows_without_their_columns(train, letters):
    unlabelled = train([{"text": "ab"}])
    with pytest.raises(RequestError, match=r'no column "label"'):
        ClassificationRows(unlabelled, letters(), 8)
    with pytest.raises(RequestError, match=r"no column 'prompt'; map one in data.columns"):
        CompletionRows(unlabelled, letters(), 8)


def test_sequence_pairs_golden(train, letters):
    given = [{"prompt": "abc", "completion": "de"}, {"prompt": "abcdefg", "completion": "hijklmn"}]
    batch = SequencePairRows(train(given), letters(add_bos=True), 6, shuffle=False).batch(np.arange(2))
    expected = {
        "encoder_tokens": [[BOS, 4, 5, 6, EOS, 0], [BOS, 4, 5, 6, 7, EOS]],
        "encoder_segments": [[1, 1, 1, 1, 1, 0], [1] * 6],
        "encoder_positions": [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]],
        "tokens": [[0, 7, 8, 0, 0, 0], [0, 11, 12, 13, 14, 15]],
        "targets": [[7, 8, EOS, 0, 0, 0], [11, 12, 13, 14, 15, EOS]],
        "weights": [[1, 1, 1, 0, 0, 0], [1] * 6],
        "segments": [[1, 1, 1, 0, 0, 0], [1] * 6],
        "positions": [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5]],
    }
    assert {name: values.tolist() for name, values in batch.items()} == expected
    assert batch["weights"].dtype == np.float32 and batch["tokens"].dtype == np.int32
    rows = SequencePairRows(
        train(given), letters(add_bos=True), 6, shuffle=False, full_completions=True, predict_eos=False
    )
    whole = rows.batch(np.arange(2))
    assert whole["targets"].tolist() == [[7, 8, EOS, 0, 0, 0, 0, 0], [11, 12, 13, 14, 15, 16, 17, EOS]]
    assert whole["weights"].sum(1).tolist() == [2, 7] and (rows.decoder_len, rows.cut) == (8, 1)


def test_pairs_golden(train, letters):
    given = [
        {"text": "ab", "pair": "cd", "label": 1.5},
        {"text": "abcdefghij", "pair": "kl", "label": 0},
        {"text": "ab", "pair": "cdefghij", "label": 2},
        {"text": "abcdefgh", "pair": "ijklmnop", "label": 2},
    ]
    rows = ClassificationRows(train(given, label_type="number"), letters(add_bos=True), 9, shuffle=False)
    batch = rows.batch(np.arange(4))
    a, b, c, d, e, f = 4, 5, 6, 7, 8, 9
    i, j, k, m = 12, 13, 14, 15
    assert batch["tokens"].tolist() == [
        [BOS, a, b, EOS, c, d, EOS, 0, 0],
        [BOS, a, b, c, d, EOS, k, m, EOS],  # the longer text is cut
        [BOS, a, b, EOS, c, d, e, f, EOS],
        [BOS, a, b, c, EOS, i, j, k, EOS],
    ]
    assert batch["types"].tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0] * 6 + [1] * 3,
        [0] * 4 + [1] * 5,
        [0] * 5 + [1] * 4,
    ]
    assert batch["segments"].sum(1).tolist() == [7, 9, 9, 9]
    assert batch["label"].tolist() == [1.5, 0, 2, 2] and batch["label"].dtype == np.float32
