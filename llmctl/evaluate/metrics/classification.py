"""Compute classification metrics: accuracy with a confidence interval, F1 (macro, micro, weighted), confusion matrix.

Example:
    >>> import numpy as np
    >>> found = scores(confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2), ["no", "yes"])
    >>> round(found["accuracy"], 3), round(found["macro_f1"], 3)
    (0.667, 0.667)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Z_95 = 1.959963984540054
"""Quantile 0.975 of the standard normal distribution; the central 95 % interval is [-Z_95, Z_95]."""


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Count examples by true and predicted class.

    Args:
        labels: True classes [N], integers from 0 to classes - 1.
        predictions: Predicted classes [N].
        classes: Number of classes C.

    Returns:
        Counts int64 [C, C]; rows are true classes, columns are predicted classes.

    Raises:
        ValueError: If a label or prediction is outside the classes, or if the lengths differ.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} must be vectors of one length")
    for what, values in (("label", labels), ("prediction", predictions)):
        outside = (values < 0) | (values >= classes)
        if outside.any():
            raise ValueError(f"{what} {values[outside][0]} is outside the {classes} classes")
    flat = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def wilson_interval(successes: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Return the bounds (low, high) of the Wilson score interval of a proportion (Wilson, 1927).

    The bounds are within [0, 1], and the coverage is correct also near 0 and 1. If `total` is 0, the result is (0, 1).
    """
    if total == 0:
        return 0.0, 1.0
    p = successes / total
    scale = 1 + z * z / total
    middle = (p + z * z / (2 * total)) / scale
    half = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / scale
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide elementwise; return 0 if the denominator is 0. For example, a class that is never predicted has precision
    0."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def scores(confusion_CC: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Compute accuracy, F1 and per-class metrics from a confusion matrix.

    Macro F1 is the unweighted mean over the classes that occur as a label or a prediction. Weighted F1 is the mean
    weighted by support, the number of examples per class. Micro F1 pools the counts, and equals accuracy because every
    example has one label.

    Args:
        confusion_CC: Counts [C, C], rows are true classes.
        names: Names of the C classes.
    """
    confusion_CC = np.asarray(confusion_CC, np.float64)
    if confusion_CC.shape != (len(names), len(names)):
        raise ValueError(f"confusion matrix {confusion_CC.shape} for {len(names)} class names")
    right_C = np.diag(confusion_CC)
    support_C, predicted_C = confusion_CC.sum(1), confusion_CC.sum(0)
    total, right = confusion_CC.sum(), right_C.sum()
    precision_C, recall_C = _ratio(right_C, predicted_C), _ratio(right_C, support_C)
    f1_C = _ratio(2 * right_C, support_C + predicted_C)
    seen_C = (support_C + predicted_C) > 0
    low, high = wilson_interval(int(right), int(total))
    accuracy = float(right / total) if total else 0.0
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": float(f1_C[seen_C].mean()) if total else 0.0,
        "micro_f1": accuracy,  # with one label per example, pooled precision = pooled recall = accuracy
        "weighted_f1": float((f1_C * support_C).sum() / total) if total else 0.0,
        "examples": int(total),
        "per_class": {
            name: {
                "precision": float(precision_C[c]),
                "recall": float(recall_C[c]),
                "f1": float(f1_C[c]),
                "support": int(support_C[c]),
            }
            for c, name in enumerate(names)
        },
        "confusion": confusion_CC.astype(np.int64).tolist(),
    }
