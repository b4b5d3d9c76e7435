"""Summarize values per example as metrics with 95 % intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmctl.evaluate.metrics.classification import wilson_interval
from llmctl.evaluate.metrics.resampling import Values, estimators, interval, resamples

RESAMPLES = 1000
"""Number of bootstrap resamples per interval."""


def with_intervals(values: Values, seed: int) -> dict[str, Any]:
    """Return each metric with the bounds of its 95 % interval, and the number of examples.

    If the values of a metric are all 0 or 1, the interval is Wilson's. Other intervals are percentile intervals of a
    bootstrap.

    Args:
        values: Values per example (see `llmctl.evaluate.metrics.resampling.Values`).
        seed: Seed of the resamples.

    Example:
        >>> with_intervals({"accuracy": np.array([True, True, False, True])}, seed=0)["accuracy"]
        0.75
    """
    count = len(next(iter(values.values())))
    known = estimators(values)
    shares = {name for name in known if values[name].ndim == 1 and np.isin(values[name], (0, 1)).all()}
    others = {name: known[name] for name in known if name not in shares}
    sampled: dict[str, list[np.ndarray]] = {name: [] for name in others}
    for count_RN in resamples(count, RESAMPLES, seed) if others else ():
        for name, estimate in others.items():
            sampled[name].append(estimate(count_RN))
    metrics: dict[str, Any] = {}
    for name, estimate in known.items():
        if name in shares:
            low, high = wilson_interval(int(values[name].sum()), count)
        else:
            low, high = interval(np.concatenate(sampled[name]))
        metrics |= {name: float(estimate(np.ones((1, count)))[0]), f"{name}_low": low, f"{name}_high": high}
    return metrics | {"examples": count}
