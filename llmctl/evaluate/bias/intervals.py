"""Compute metrics with 95 % intervals from values per example."""

from __future__ import annotations

import math

import numpy as np

from llmctl.evaluate.metrics.classification import wilson_interval
from llmctl.evaluate.metrics.resampling import Estimator, Values, estimators, interval, resamples

RESAMPLES = 1000
"""Number of bootstrap resamples per interval."""
SEED = 0


def with_intervals(values: Values) -> dict[str, float]:
    """Return each metric that can be computed from `values`, with its bounds as NAME_low and NAME_high.

    A proportion has Wilson's interval. Other metrics have a percentile interval of bootstrap resamples. If a metric
    concerns a part of the examples, the resamples contain only this part. If the part is empty, there is no metric.

    Example:
        >>> found = with_intervals({"accuracy": np.array([True, False])})
        >>> {name: round(value, 3) for name, value in found.items()}
        {'accuracy': 0.5, 'accuracy_low': 0.095, 'accuracy_high': 0.905}
    """
    found = {}
    for name, estimate in estimators(values).items():
        parts = np.asarray(values[name]) if name in values else np.asarray(next(iter(values.values())))
        if name in values and parts.ndim > 1:
            parts = parts[parts[..., 1].reshape(len(parts), -1).any(1)]
            estimate = estimators({name: parts})[name]
        if not (count := len(parts)):
            continue
        found[name] = float(estimate(np.ones((1, count)))[0])
        if name in values and _proportion(parts):
            low, high = wilson_interval(int((parts if parts.ndim == 1 else parts[:, 0]).sum()), count)
        else:
            low, high = _bootstrap(estimate, count)
        if math.isfinite(low) and math.isfinite(high):
            found |= {f"{name}_low": low, f"{name}_high": high}
    return found


def _proportion(parts: np.ndarray) -> bool:
    """Return whether the metric is a proportion: each value is 0 or 1, or a pair (numerator 0 or 1, denominator 1)."""
    return parts.ndim < 3 and bool(np.isin(parts, (0, 1)).all()) and (parts.ndim == 1 or bool(parts[:, 1].all()))


def _bootstrap(estimate: Estimator, count: int) -> tuple[float, float]:
    return interval(np.concatenate([estimate(count_RN) for count_RN in resamples(count, RESAMPLES, SEED)]))
