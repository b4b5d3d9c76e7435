"""Compute metrics with 95 % intervals from values per example."""

from __future__ import annotations

import math

import numpy as np

from llmctl.evaluate.metrics.classification import wilson_interval
from llmctl.evaluate.metrics.resampling import Values, estimators, interval, resamples

RESAMPLES = 1000
"""Number of bootstrap resamples per interval."""
SEED = 0


def proportion(name: str, success_N: np.ndarray) -> dict[str, float]:
    """Return the fraction of true values and Wilson's interval, under `name`, `name`_low and `name`_high.

    Example:
        >>> {k: round(v, 3) for k, v in proportion("accuracy", np.array([True, False])).items()}
        {'accuracy': 0.5, 'accuracy_low': 0.095, 'accuracy_high': 0.905}
    """
    low, high = wilson_interval(int(success_N.sum()), len(success_N))
    return {name: float(success_N.mean()), f"{name}_low": low, f"{name}_high": high}


def bootstrapped(values: Values) -> dict[str, float]:
    """Return all metrics that `values` suffice for, each with a percentile interval of bootstrap resamples.

    Resamples for which a metric is undefined, such as those without an example of a group, are omitted from its
    interval.
    """
    known = estimators(values)
    N = len(next(iter(values.values())))
    sampled: dict[str, list[np.ndarray]] = {name: [] for name in known}
    for count_RN in resamples(N, RESAMPLES, SEED):
        for name, estimate in known.items():
            sampled[name].append(estimate(count_RN))
    found = {}
    for name, estimate in known.items():
        low, high = interval(np.concatenate(sampled[name]))
        found |= {name: float(estimate(np.ones((1, N)))[0])}
        if math.isfinite(low) and math.isfinite(high):
            found |= {f"{name}_low": low, f"{name}_high": high}
    return found
