"""Baselines against counts by hand."""

import numpy as np
import pytest

from llmctl.data.baselines import describe, guesses


class Rows:
    """Targets 7 7 8 | 7 9 9, the third of each row without weight; labels yes, no, none, yes."""

    def __len__(self):
        return 4

    def batch(self, rows_B):
        targets = np.array([[7, 7, 8], [7, 9, 9]] * 2)[rows_B]
        weights = np.array([[1.0, 1.0, 0.0]] * 4)[rows_B]
        return {"targets": targets, "weights": weights, "next_label": np.array([0, 1, -1, 0])[rows_B]}


def test_the_best_constant_answers():
    found = guesses(Rows(), 100)
    assert found["baseline_accuracy"] == 6 / 8
    assert found["baseline_loss"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert found["baseline_next_sentence_accuracy"] == pytest.approx(2 / 3)
    assert describe(found) == "one scores accuracy 75.00% and loss 0.5623, next sentence 66.67%"
    assert guesses(Rows(), 1)["baseline_accuracy"] == 1
