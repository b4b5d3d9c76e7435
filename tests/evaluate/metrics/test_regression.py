"""Scores of numbers against values by hand."""

import numpy as np
import pytest

from llmctl.evaluate.metrics.regression import scores


def test_scores_by_hand():
    found = scores(np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 2.0, 5.0, 5.0]))
    assert found["rmse"] == pytest.approx(np.sqrt(6 / 4)) and found["mae"] == 1 and found["examples"] == 4
    assert found["pearson"] == pytest.approx(9 / np.sqrt(14 * 9))
    assert found["spearman"] == pytest.approx(4 / np.sqrt(5 * 4))  # ranks 0 1 2 3 against 0.5 0.5 2.5 2.5
    assert found["baseline_rmse"] == pytest.approx(np.sqrt(14 / 4))


def test_a_constant_answer_has_no_correlation():
    assert scores(np.array([1.0, 2.0]), np.array([3.0, 3.0]))["pearson"] == 0
