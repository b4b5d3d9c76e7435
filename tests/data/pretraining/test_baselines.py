"""Compare baselines with counts computed by hand."""

import numpy as np
import pytest

from llmctl.data.pretraining.baselines import constant_scores, describe


class Rows:
    """Rows with the targets 7 7 8 | 7 9 9 and the labels yes, no, none, yes. The third target of each row has no
    weight."""

    def __len__(self):
        return 4

    def batch(self, rows_B):
        targets = np.array([[7, 7, 8], [7, 9, 9]] * 2)[rows_B]
        weights = np.array([[1.0, 1.0, 0.0]] * 4)[rows_B]
        return {"targets": targets, "weights": weights, "next_label": np.array([0, 1, -1, 0])[rows_B]}


def test_the_best_constant_answers():
    found = constant_scores(Rows(), 100)
    assert found["baseline_accuracy"] == 6 / 8
    assert found["baseline_loss"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert found["baseline_next_sentence_accuracy"] == pytest.approx(2 / 3)
    assert describe(found) == "accuracy 75.00%, loss 0.5623, next sentence 66.67%"
    assert constant_scores(Rows(), 1)["baseline_accuracy"] == 1


class Spans:
    """Decoder rows 90 7 8 91 7 1 and 90 8 1 with padding; 90 and 91 are sentinels, 1 is the end of sequence."""

    def __len__(self):
        return 2

    def batch(self, rows_B):
        targets = np.array([[90, 7, 8, 91, 7, 1], [90, 8, 1, 0, 0, 0]])[rows_B]
        positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0]])[rows_B]
        tokens = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        return {"targets": targets, "tokens": tokens, "positions": positions, "weights": np.float32(targets > 0)}


def test_whoever_knows_the_form_of_spans_need_not_read_to_score():
    """First: always a sentinel. After a sentinel: 7, 7 and 8. After a word: 8, a sentinel, and twice the end."""
    found = constant_scores(Spans(), 100, sentinels=[90, 91])
    assert found["baseline_accuracy"] == pytest.approx((2 + 2 + 2) / 9)
    after_sentinel = 2 * np.log(2 / 3) + np.log(1 / 3)
    after_word = 2 * np.log(1 / 2) + 2 * np.log(1 / 4)
    assert found["baseline_loss"] == pytest.approx(-(after_sentinel + after_word) / 9)
    assert constant_scores(Spans(), 100)["baseline_loss"] > found["baseline_loss"]
