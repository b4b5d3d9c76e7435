"""Calibration: values by hand, and a temperature that is known."""

import numpy as np
import pytest

from llmctl.evaluate.metrics import calibration


def test_error_by_hand():
    p_NC = np.array([[0.95, 0.05], [0.95, 0.05], [0.05, 0.95], [0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])
    label_N = np.array([0, 1, 1, 0, 0, 0])
    found = calibration.scores(p_NC, label_N)
    # 0.95: 2 of 3 right; 0.6: 1 of 2 right; 0.5: right.
    assert [(n, round(sure, 6), round(right, 6)) for n, sure, right in found["reliability"]] == [
        (1, 0.5, 1.0), (2, 0.6, 0.5), (3, 0.95, 0.666667),
    ]  # fmt: skip
    np.testing.assert_allclose(found["ece"], (1 * 0.5 + 2 * 0.1 + 3 * (0.95 - 2 / 3)) / 6)
    want = -np.log([0.95, 0.05, 0.95, 0.6, 0.4, 0.5]).mean()
    np.testing.assert_allclose(found["log_loss"], want)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_of_sampled_labels_is_found(true):
    rng = np.random.default_rng(0)
    logits_NC = 3 * rng.normal(size=(20_000, 4))
    p_NC = calibration.softmax(logits_NC / true)
    label_N = (p_NC.cumsum(-1) < rng.random((20_000, 1))).sum(-1)
    found = calibration.temperature(logits_NC, label_N)
    np.testing.assert_allclose(found, true, rtol=0.03)
    at = [
        calibration.scores(calibration.softmax(logits_NC / t), label_N)["log_loss"]
        for t in (found, found * 1.1, found / 1.1)
    ]
    assert at[0] == min(at)
    assert calibration.scores(calibration.softmax(logits_NC / found), label_N)["ece"] < 0.01


def test_without_a_minimum_the_probabilities_stay():
    logits_NC = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert calibration.temperature(logits_NC, np.array([0, 1])) == 1.0  # never wrong: any certainty would do
    assert calibration.temperature(logits_NC, np.array([1, 0])) == 1.0  # always wrong
