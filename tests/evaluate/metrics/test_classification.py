"""Golden values computed by hand."""

import numpy as np
import pytest

from llmctl.evaluate.metrics import classification as C

# True 0: three right, one called 1. True 1: two right, one called 0, one called 2. True 2: one right, one called 1.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
PREDICTIONS = np.array([0, 0, 0, 1, 1, 1, 0, 2, 2, 1])


def test_confusion_matrix_has_truth_in_rows():
    np.testing.assert_array_equal(C.confusion_matrix(LABELS, PREDICTIONS, 3), [[3, 1, 0], [1, 2, 1], [0, 1, 1]])


def test_scores_by_hand():
    got = C.scores(C.confusion_matrix(LABELS, PREDICTIONS, 3), ["a", "b", "c"])
    assert got["accuracy"] == got["micro_f1"] == 0.6
    assert got["per_class"]["a"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4}
    assert got["per_class"]["b"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 4}
    assert got["per_class"]["c"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert got["macro_f1"] == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert got["weighted_f1"] == pytest.approx(0.4 * 0.75 + 0.4 * 0.5 + 0.2 * 0.5)
    assert got["examples"] == 10 and got["confusion"] == [[3, 1, 0], [1, 2, 1], [0, 1, 1]]


def test_a_class_that_is_never_predicted_scores_zero_and_an_absent_one_is_left_out_of_the_mean():
    got = C.scores(np.array([[4, 0, 0], [2, 0, 0], [0, 0, 0]]), ["a", "b", "c"])
    # a: precision 4/6, recall 1 -> F1 0.8; b: 0; c never occurs.
    assert got["macro_f1"] == pytest.approx(0.4)
    assert got["weighted_f1"] == pytest.approx(0.8 * 4 / 6)
    assert got["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # p = 1/2, n = 4: middle 0.5, half = 1.959964/1.960365 * sqrt(1/16 + 3.841459/64) = 0.349961.
        (2, 4, 0.150039, 0.849961),
        (0, 10, 0.0, 0.277533),  # the upper end is z²/(n+z²)
        (10, 10, 0.722467, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_by_hand(successes, total, low, high):
    assert C.wilson_interval(successes, total) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="label 3 is outside the 3 classes"):
        C.confusion_matrix(np.array([3]), np.array([0]), 3)
    with pytest.raises(ValueError, match="one length"):
        C.confusion_matrix(np.array([0, 1]), np.array([0]), 2)
    with pytest.raises(ValueError, match="2 class names"):
        C.scores(np.eye(3), ["a", "b"])
