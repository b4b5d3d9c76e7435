"""Compute regression metrics: errors in the label's unit, and correlations."""

from __future__ import annotations

import numpy as np


def scores(label_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, float]:
    """Compute the metrics of predicted numbers.

    Args:
        label_N: True values [N].
        predicted_N: Predicted values [N].

    Returns:
        rmse: Root mean squared error in the label's unit.
        mae: Mean absolute error in the label's unit.
        pearson, spearman: Correlations of true and predicted values; 0 if true or predicted values are constant.
        baseline_rmse: Root mean squared error of the best constant prediction.
        examples: Number of examples N.
    """
    y, p = np.asarray(label_N, np.float64), np.asarray(predicted_N, np.float64)
    return {
        "rmse": float(np.sqrt(np.mean(np.square(p - y)))),
        "mae": float(np.mean(np.abs(p - y))),
        "pearson": _correlation(y, p),
        "spearman": _correlation(_ranks(y), _ranks(p)),
        "baseline_rmse": float(np.std(y)),
        "examples": len(y),
    }


def _correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    scale = np.sqrt((a_N**2).sum() * (b_N**2).sum())
    return float((a_N * b_N).sum() / scale) if scale > 0 else 0.0


def _ranks(x_N: np.ndarray) -> np.ndarray:
    """Return ranks [N] from 0; equal values get the mean of their ranks."""
    _, place_N, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place_N]
