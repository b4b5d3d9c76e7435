"""Measure and improve how well the probabilities of a classifier match its accuracy.

Example:
    >>> import numpy as np
    >>> p_NC = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    >>> found = scores(p_NC, np.array([0, 0, 1, 0]))  # always right at 0.9, right half of the times at 0.6
    >>> round(found["ece"], 6)
    0.1
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 15
"""Number of confidence bins, as in Guo et al. (2017)."""
COLDEST, HOTTEST = 0.05, 20.0
"""Lowest and highest temperature that the search in `temperature` tries."""
STEPS = 60
"""Number of bisection steps in the search for the log temperature. The result is exact to float64."""


def scores(p_NC: np.ndarray, label_N: np.ndarray) -> dict[str, Any]:
    """Return the expected calibration error, the log loss, and a reliability table.

    The confidence of a prediction is the probability of the predicted class. Predictions are grouped by confidence into
    bins of equal width. The calibration error is the mean of |accuracy - confidence| over the bins, weighted by the
    number of predictions (Guo et al., 2017, arXiv:1706.04599).

    Args:
        p_NC: Probabilities of the classes [N, C].
        label_N: True classes [N].

    Returns:
        ece: Expected calibration error.
        log_loss: Mean negative log-probability of the true class, in nats.
        reliability: [count, mean confidence, accuracy] of each bin that has predictions.
    """
    confidence_N = p_NC.max(-1).astype(np.float64)
    right_N = p_NC.argmax(-1) == label_N
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    parts = [
        [int(here.sum()), float(confidence_N[here].mean()), float(right_N[here].mean())]
        for here in (bin_N == b for b in range(BINS))
        if here.any()
    ]
    return {
        "ece": sum(count * abs(right - sure) for count, sure, right in parts) / len(label_N),
        "log_loss": float(log_losses(p_NC, label_N).mean()),
        "reliability": parts,
    }


def log_losses(p_NC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Return the negative log-probability of each true class in nats, float64 [N]."""
    of_label_N = np.take_along_axis(p_NC, label_N[:, None], -1)[:, 0].astype(np.float64)
    return -np.log(np.maximum(of_label_N, 1e-300))


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Return the softmax probabilities of logits, float64 [N, C]."""
    exp_NC = np.exp(logits_NC.astype(np.float64) - logits_NC.max(-1, keepdims=True))
    return exp_NC / exp_NC.sum(-1, keepdims=True)


def temperature(logits_NC: np.ndarray, label_N: np.ndarray) -> float:
    """Return the divisor of the logits that minimizes the log loss (Guo et al., 2017, arXiv:1706.04599).

    The loss is convex in the inverse temperature, so the sign of its derivative is bisected between COLDEST and
    HOTTEST. If the minimum is outside this interval, for example because no prediction is wrong, the result is 1.
    """
    logits_NC = logits_NC.astype(np.float64)
    of_label_N = np.take_along_axis(logits_NC, label_N[:, None], -1)[:, 0]
    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        expected_N = (softmax(np.exp(middle) * logits_NC) * logits_NC).sum(-1)
        falls = np.mean(expected_N - of_label_N) < 0
        low, high = (middle, high) if falls else (low, middle)
    found = float(np.exp(-(low + high) / 2))
    return found if COLDEST * 1.001 < found < HOTTEST / 1.001 else 1.0
