"""Add bootstrap intervals to the metrics of an evaluation that have no interval of their own."""

from __future__ import annotations

import math

import numpy as np

from llmctl.evaluate.comparison import example_count, in_order
from llmctl.evaluate.metrics.resampling import estimators, interval, resamples
from llmctl.evaluate.stored import Scored


def with_intervals(scored: Scored, count: int, seed: int) -> Scored:
    """Return a result with bootstrap intervals of its metrics that have no other interval.

    Intervals of an earlier bootstrap are removed.

    Args:
        scored: Result with values per example.
        count: Number of resamples; 0 adds no intervals.
        seed: Seed of the resamples.
    """
    result = {k: v for k, v in scored.result.items() if k != "bootstrap"}
    earlier = scored.result.get("bootstrap", {}).get("metrics", [])
    removed = {f"{name}_{end}" for name in earlier for end in ("low", "high")}
    metrics = {k: v for k, v in result["metrics"].items() if k not in removed}
    known = {
        name: estimate
        for name, estimate in estimators(scored.values).items()
        if metrics.get(name) is not None and f"{name}_low" not in metrics
    }
    if not count or not known:
        return Scored({**result, "metrics": metrics}, scored.records, scored.values)
    sampled: dict[str, list[np.ndarray]] = {name: [] for name in known}
    for count_RN in resamples(example_count(scored.values), count, seed):
        for name, estimate in known.items():
            sampled[name].append(estimate(count_RN))
    ends = {name: interval(np.concatenate(each)) for name, each in sampled.items()}
    ends = {name: pair for name, pair in ends.items() if all(map(math.isfinite, pair))}
    bounds = {
        f"{name}_{end}": value for name, pair in ends.items() for end, value in zip(("low", "high"), pair, strict=True)
    }
    about = {"resamples": count, "seed": seed, "metrics": in_order(ends)}
    return Scored({**result, "metrics": metrics | bounds, "bootstrap": about}, scored.records, scored.values)
