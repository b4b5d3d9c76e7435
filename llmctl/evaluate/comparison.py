"""Compare artifacts on the same examples: differences of metrics with paired bootstrap intervals and p-values.

Both artifacts have values for each example. A resample of the examples gives one value of the metric per artifact, and
the difference of the two. Examples that are hard for both artifacts cancel. The interval of the difference is therefore
narrower than the intervals of the two metrics suggest (Berg-Kirkpatrick et al., 2012, "An Empirical Investigation of
Statistical Significance in NLP").

Shapes: N examples, R resamples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.evaluate.metrics.base import METRICS
from llmctl.evaluate.metrics.resampling import Estimator, Values, estimators, interval, resamples
from llmctl.evaluate.stored import Scored

COMPARISONS = "comparisons.json"
"""Name of the file with the comparisons of an evaluation."""
RESAMPLES = 10_000
"""Number of resamples per comparison."""

Comparison = dict[str, Any]
"""Comparison of two artifacts on a task: "artifact", "against", "task", "examples", "resamples", "seed" and "metrics".

Each metric has "value", "against", "difference", "difference_low", "difference_high", "p_value" and "test".
"""


def compare(
    found: Sequence[Scored], against: str, seed: int, say: Callable[[str], None], count: int = RESAMPLES
) -> list[Comparison]:
    """Compare each artifact with the artifact `against` on every task.

    Args:
        found: Results of all artifacts, with values per example.
        against: Name of the artifact with which the others are compared.
        seed: Seed of the resamples.
        say: Function that is called with one line of text per task that cannot be compared.
        count: Number of resamples.

    Raises:
        RequestError: If two results have different examples or different protocols.
    """
    theirs = {s.result["record"]: s for s in found if s.result["artifact"] == against}
    compared = []
    for scored in (s for s in found if s.result["artifact"] != against):
        result, other = scored.result, theirs[scored.result["record"]]
        if not (scored.values and other.values):  # a group of the harness has no documents of its own
            say(f"{result['artifact']}: {result['task']}: not compared, because it has no values per example")
            continue
        where = f"against: {result['artifact']} and {against} on {result['task']}"
        pair = _paired(scored, other, where)
        compared.append(
            {name: result[name] for name in ("artifact", "task")}
            | {"against": against, "examples": example_count(pair[0]), "resamples": count, "seed": seed}
            | {"metrics": differences(*pair, in_order(result["metrics"]), seed, count)}
        )
    return compared


def _paired(one: Scored, other: Scored, where: str) -> tuple[Values, Values]:
    """Check that two results have the same examples, and return their values.

    If the tokenizers split the texts differently, the numbers of tokens are omitted. Metrics per token are then not
    comparable, but metrics per word and per byte are.
    """
    a, b = one.values, other.values
    same = example_count(a) == example_count(b) and all(
        np.array_equal(a[name], b[name]) for name in ("document_words", "document_bytes") if name in a and name in b
    )
    if not same:
        raise RequestError(f"{where}: the examples differ; measure both on the same data")
    if "document_nll" in a and one.result["protocol"] != other.result["protocol"]:
        raise RequestError(f"{where}: the protocols differ ({one.result['protocol']}; {other.result['protocol']})")
    if "document_tokens" in a and not np.array_equal(a["document_tokens"], b["document_tokens"]):
        a, b = ({k: v for k, v in values.items() if k != "document_tokens"} for values in (a, b))
    return a, b


def example_count(values: Values) -> int:
    """Return the number of examples that have values."""
    return len(next(iter(values.values())))


def in_order(metrics: Iterable[str]) -> list[str]:
    """Return names of metrics in the order of the registry; metrics that are not registered are last."""
    metrics = list(metrics)
    return [name for name in METRICS if name in metrics] + [name for name in metrics if name not in METRICS]


def differences(one: Values, other: Values, names: Iterable[str], seed: int, count: int = RESAMPLES) -> dict[str, Any]:
    """Return the difference of each metric between two artifacts, with a 95 % interval and a p-value.

    The interval is the percentile interval of a paired bootstrap. If all values are 0 or 1, the p-value is that of
    McNemar's exact test. Otherwise, the p-value is twice the smaller of two shares: the share of resamples with a
    difference <= 0, and the share of resamples with a difference >= 0.

    Args:
        one: Values per example of the first artifact.
        other: Values of the same examples for the second artifact.
        names: Metrics to compare; metrics that cannot be computed from the values are omitted.
        seed: Seed of the resamples.
        count: Number of resamples.

    Example:
        >>> right, wrong = np.ones(8), np.zeros(8)
        >>> differences({"accuracy": right}, {"accuracy": wrong}, ["accuracy"], seed=0)["accuracy"]["p_value"]
        0.0078125
    """
    sides = estimators(one), estimators(other)
    pairs = {name: (sides[0][name], sides[1][name]) for name in names if name in sides[0] and name in sides[1]}
    N = example_count(one)
    sampled: dict[str, list[np.ndarray]] = {name: [] for name in pairs}
    for count_RN in resamples(N, count, seed):
        for name, pair in pairs.items():
            sampled[name].append(_difference(pair, count_RN))
    found = {}
    for name, pair in pairs.items():
        difference_R = np.concatenate(sampled[name])
        value, against = (float(f(np.ones((1, N)))[0]) for f in pair)
        if not (np.isfinite([value, against]).all() and np.isfinite(difference_R).all()):
            continue  # JSON has no infinity, which a perplexity may be
        low, high = interval(difference_R)
        found[name] = {
            "value": value,
            "against": against,
            "difference": value - against,
            "difference_low": low,
            "difference_high": high,
        }
        if name in one and _binary(one[name]) and _binary(other[name]):
            only_one, only_other = (int(np.sum(a > b)) for a, b in ((one[name], other[name]), (other[name], one[name])))
            found[name] |= {"p_value": mcnemar(only_one, only_other), "test": "McNemar"}
            found[name] |= {"only_artifact": only_one, "only_against": only_other}
        else:
            least = min(np.sum(difference_R <= 0), np.sum(difference_R >= 0))
            found[name] |= {"p_value": min(1.0, float(2 * (least + 1) / (count + 1))), "test": "bootstrap"}
    return found


def _difference(pair: tuple[Estimator, Estimator], count_RN: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return pair[0](count_RN) - pair[1](count_RN)


def _binary(values: np.ndarray) -> bool:
    return values.ndim == 1 and bool(np.isin(values, (0, 1)).all())


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar, 1947).

    The test uses only the examples that exactly one of two artifacts answers correctly. Under the null hypothesis, each
    artifact is equally likely to be the correct one.

    Args:
        only_one: Number of examples that only the first artifact answers correctly.
        only_other: Number of examples that only the second artifact answers correctly.

    Example:
        >>> mcnemar(1, 5)
        0.21875
    """
    total = only_one + only_other
    term = below = 1
    for k in range(min(only_one, only_other)):
        term = term * (total - k) // (k + 1)  # the next binomial coefficient
        below += term
    return min(1.0, 2 * below / 2**total)


def write(compared: Sequence[Comparison], folder: Path) -> None:
    """Write comparisons into a folder; without comparisons, no file is written."""
    if compared:
        text = json.dumps(compared, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / COMPARISONS).write_text(text + "\n", encoding="utf-8")
