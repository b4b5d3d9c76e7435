"""Compute metrics on bootstrap resamples of the examples of an evaluation (Efron and Tibshirani, 1993).

A resample has as many examples as the evaluation, sampled with replacement. A resample is represented by the number of
times that each example occurs. Two artifacts are compared on the same resamples, so their differences are paired.

Example:
    >>> import numpy as np
    >>> right_N = np.array([1.0, 1.0, 0.0, 1.0])
    >>> estimators({"accuracy": right_N})["accuracy"](np.array([[1, 1, 1, 1], [0, 0, 2, 2]])).tolist()
    [0.75, 0.5]

Shapes: N examples, R resamples, C classes, S sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

CHUNK = 2**20
"""Maximum number of entries of a chunk of counts [R, N], so that a chunk has 8 MiB."""
LEVEL = 95.0
"""Coverage of an interval, in percent."""

Values = Mapping[str, np.ndarray]
"""Values per example: arrays whose first axis has one entry per example, by name.

If a name is an input of `ESTIMATES`, the array is this input. Otherwise the name is a metric. An array [N] contains
values whose mean is the metric. An array [N, 2] contains numerators and denominators, whose sums have the metric as
their ratio. An array [N, G, 2] contains numerators and denominators of G groups; the metric is the
largest difference between the ratios of two groups.
"""
Estimator = Callable[[np.ndarray], np.ndarray]
"""Function that returns the value of a metric for each resample, [R]. Its argument is the number of occurrences of each
example in each resample, [R, N]."""


def estimators(values: Values) -> dict[str, Estimator]:
    """Return functions that compute metrics on resamples, by the name of the metric.

    Metrics whose inputs are not in `values` are omitted.

    Example:
        >>> values = {"document_nll": np.log([2.0, 8.0]), "document_tokens": np.ones(2)}
        >>> round(float(estimators(values)["perplexity"](np.ones((1, 2)))[0]), 6)
        4.0
    """
    inputs = {name for estimate in ESTIMATES.values() for name in estimate.inputs}
    found: dict[str, Estimator] = {
        name: partial((_mean, _ratio, _gap)[a.ndim - 1], np.asarray(a, np.float64))
        for name, a in values.items()
        if name not in inputs
    }
    for name, estimate in ESTIMATES.items():
        if all(key in values for key in estimate.inputs):
            found[name] = partial(estimate.compute, *(np.asarray(values[key], np.float64) for key in estimate.inputs))
    return found


def resamples(examples: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield chunks [R, N] with the number of occurrences of each example in each of `count` resamples."""
    rng = np.random.default_rng(seed % 2**64)
    chunk = max(1, CHUNK // examples)
    for start in range(0, count, chunk):
        R = min(chunk, count - start)
        sampled_RN = rng.integers(examples, size=(R, examples)) + examples * np.arange(R)[:, None]
        yield np.bincount(sampled_RN.ravel(), minlength=R * examples).reshape(R, examples).astype(np.float64)


def interval(value_R: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of a metric's values on resamples."""
    low, high = np.percentile(value_R, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def _mean(value_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    return count_RN @ value_N / count_RN.sum(1)


def _ratio(parts_N2: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    above_R, below_R = (count_RN @ parts_N2).T
    return _quotient(above_R, below_R)


def _gap(parts_NG2: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    """Return the largest difference between the ratios of two groups; groups without examples are omitted."""
    above_RG, below_RG = np.moveaxis(np.tensordot(count_RN, parts_NG2, 1), -1, 0)
    ratio_RG, there_RG = _quotient(above_RG, below_RG), below_RG > 0
    high_R, low_R = np.where(there_RG, ratio_RG, -np.inf).max(1), np.where(there_RG, ratio_RG, np.inf).min(1)
    return np.where(there_RG.sum(1) > 1, high_R - low_R, 0.0)


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide elementwise; return 0 if the denominator is 0, as the metrics do."""
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)


def _per_unit(nll_N: np.ndarray, units_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    return _ratio(np.stack([nll_N, units_N], axis=1), count_RN)


def _perplexity(nll_N: np.ndarray, units_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(_per_unit(nll_N, units_N, count_RN))


def _bits(nll_N: np.ndarray, bytes_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    return _per_unit(nll_N, bytes_N, count_RN) / np.log(2)


def _f1(label: np.ndarray, prediction: np.ndarray, count_RN: np.ndarray, weighted: bool) -> np.ndarray:
    """Return macro F1. If `weighted` is true, return the F1 weighted by the number of examples per class instead.

    Labels and predictions are class numbers [N], or masks [N, C] of the classes of each example.
    """
    if label.ndim == 1:
        class_C = np.union1d(label, prediction)
        label, prediction = label[:, None] == class_C, prediction[:, None] == class_C
    hit_RC, support_RC, predicted_RC = (count_RN @ np.float64(a) for a in (label * prediction, label, prediction))
    f1_RC = _quotient(2 * hit_RC, support_RC + predicted_RC)
    weight_RC = support_RC if weighted else np.float64(support_RC + predicted_RC > 0)
    return _quotient((f1_RC * weight_RC).sum(1), weight_RC.sum(1))


def _error(label_N: np.ndarray, prediction_N: np.ndarray, count_RN: np.ndarray, power: int) -> np.ndarray:
    return _mean(np.abs(prediction_N - label_N) ** power, count_RN) ** (1 / power)


def _pearson(label_N: np.ndarray, prediction_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    return _correlation(label_N[None], prediction_N[None], count_RN)


def _spearman(label_N: np.ndarray, prediction_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    return _correlation(_ranks(label_N, count_RN), _ranks(prediction_N, count_RN), count_RN)


def _ranks(value_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    """Return the rank of each example within each resample, [R, N]; equal values get the mean of their ranks."""
    order_N = np.argsort(value_N, kind="stable")
    _, first_U, place_N = np.unique(value_N[order_N], return_index=True, return_inverse=True)
    count_RU = np.add.reduceat(count_RN[:, order_N], first_U, axis=1)
    rank_RU = np.cumsum(count_RU, axis=1) - (count_RU + 1) / 2
    rank_RN = np.empty_like(count_RN)
    rank_RN[:, order_N] = rank_RU[:, place_N]
    return rank_RN


def _correlation(a_RN: np.ndarray, b_RN: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    """Return the correlation within each resample, [R]; 0 if one of the two variables is constant."""
    total_R1 = count_RN.sum(1, keepdims=True)
    a_RN, b_RN = (x_RN - (x_RN * count_RN).sum(1, keepdims=True) / total_R1 for x_RN in (a_RN, b_RN))
    ab_R, aa_R, bb_R = ((count_RN * x_RN * y_RN).sum(1) for x_RN, y_RN in ((a_RN, b_RN), (a_RN, a_RN), (b_RN, b_RN)))
    return _quotient(ab_R, np.sqrt(aa_R * bb_R))


def _bleu(counts_NS: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    """Return BLEU with exponential smoothing, as sacrebleu computes it by default.

    A row of `counts_NS` has ten counts of one text:

    - the lengths of the prediction and of the reference
    - the numbers of n-grams of the prediction that match the reference, for n from 1 to 4
    - the numbers of all n-grams of the prediction, for n from 1 to 4
    """
    sums_RS = count_RN @ counts_NS
    ours_R, theirs_R = sums_RS[:, 0], sums_RS[:, 1]
    equal_R4, all_R4 = np.split(sums_RS[:, 2:], 2, axis=1)
    smoothed_R4 = np.where(equal_R4 > 0, equal_R4, 0.5 ** np.cumsum(equal_R4 == 0, axis=1))
    precision_R4 = 100 * _quotient(smoothed_R4, all_R4)
    with np.errstate(divide="ignore"):
        geometric_R = np.exp(np.log(precision_R4).mean(1))
    penalty_R = np.exp(np.minimum(0, 1 - _quotient(theirs_R, ours_R)))
    return np.where(equal_R4.any(1), penalty_R * geometric_R, 0.0)


def _chrf(counts_NS: np.ndarray, count_RN: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """Return chrF.

    For each length of n-grams, `counts_NS` has three counts: n-grams of the prediction, n-grams of the reference, and
    n-grams that both share. If prediction or reference have no n-gram of a length in a resample, the length is omitted
    from the means.
    """
    ours_RL, theirs_RL, equal_RL = (count_RN @ counts_NS).reshape(len(count_RN), -1, 3).transpose(2, 0, 1)
    used_RL = (ours_RL > 0) & (theirs_RL > 0)
    precision_R, recall_R = (
        _quotient((_quotient(equal_RL, n_RL) * used_RL).sum(1), used_RL.sum(1)) for n_RL in (ours_RL, theirs_RL)
    )
    return 100 * _quotient((1 + beta**2) * precision_R * recall_R, beta**2 * precision_R + recall_R)


def _mean_over_terms(term_N: np.ndarray, value_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    """Return the mean over terms of the mean value of each term's examples; terms without examples are omitted."""
    of_NT = (term_N[:, None] == np.unique(term_N)).astype(np.float64)
    count_RT = count_RN @ of_NT
    return _quotient((count_RN @ (of_NT * value_N[:, None])), count_RT).sum(1) / (count_RT > 0).sum(1)


def _icat(term_N: np.ndarray, meaningful_N: np.ndarray, stereotypical_N: np.ndarray, count_RN: np.ndarray) -> Any:
    """Return the idealized context association test score of StereoSet, between 0 and 1."""
    modelling_R, stereotype_R = (_mean_over_terms(term_N, v_N, count_RN) for v_N in (meaningful_N, stereotypical_N))
    return modelling_R * np.minimum(stereotype_R, 1 - stereotype_R) * 2


@dataclass(frozen=True)
class Estimate:
    """Describe how a metric is computed from values per example."""

    inputs: tuple[str, ...]
    """Names of the arrays in `Values` that the metric is computed from."""
    compute: Callable[..., Any]
    """Function that returns the value of the metric for each resample, [R]. Its arguments are the arrays `inputs`, and
    the number of occurrences of each example in each resample, [R, N]."""


_ANSWERS = ("label", "prediction")
ESTIMATES: dict[str, Estimate] = {
    "macro_f1": Estimate(_ANSWERS, partial(_f1, weighted=False)),
    "weighted_f1": Estimate(_ANSWERS, partial(_f1, weighted=True)),
    "rmse": Estimate(_ANSWERS, partial(_error, power=2)),
    "mae": Estimate(_ANSWERS, partial(_error, power=1)),
    "pearson": Estimate(_ANSWERS, _pearson),
    "spearman": Estimate(_ANSWERS, _spearman),
    "perplexity": Estimate(("document_nll", "document_tokens"), _perplexity),
    "nll": Estimate(("document_nll", "document_tokens"), _per_unit),
    "word_perplexity": Estimate(("document_nll", "document_words"), _perplexity),
    "byte_perplexity": Estimate(("document_nll", "document_bytes"), _perplexity),
    "bits_per_byte": Estimate(("document_nll", "document_bytes"), _bits),
    "bleu": Estimate(("bleu_counts",), _bleu),
    "chrf": Estimate(("chrf_counts",), _chrf),
    "language_modelling_score": Estimate(("target_term", "meaningful"), _mean_over_terms),
    "stereotype_score": Estimate(("target_term", "stereotypical"), _mean_over_terms),
    "icat": Estimate(("target_term", "meaningful", "stereotypical"), _icat),
}
"""Metrics that are computed from arrays with other names. Every other metric is computed from the array with its own
name (see `Values`)."""
