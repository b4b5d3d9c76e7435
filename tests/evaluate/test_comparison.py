"""Paired comparisons: six examples by hand, scipy's binomial test, coverage of the interval, and refusals."""

import itertools

import numpy as np
import pytest
from scipy import stats

from llmctl.config.errors import RequestError
from llmctl.evaluate import comparison
from llmctl.evaluate.bootstrap_intervals import with_intervals
from llmctl.evaluate.stored import Scored

ONE, OTHER = np.array([1, 1, 1, 1, 0, 1]), np.array([1, 0, 0, 1, 1, 0])


def test_six_examples_by_hand():
    """Differences are 0 1 1 0 -1 1. Only the first is right three times, only the other once: p = 2 * 5 / 16."""
    found = comparison.differences({"accuracy": ONE}, {"accuracy": OTHER}, ["accuracy"], seed=0)["accuracy"]
    assert (found["value"], found["against"], found["difference"]) == pytest.approx((5 / 6, 3 / 6, 2 / 6))
    assert (found["only_artifact"], found["only_against"]) == (3, 1)
    assert (found["p_value"], found["test"]) == (0.625, "McNemar")
    # All 6**6 resamples are equally likely.
    means = np.array(list(itertools.product(ONE - OTHER, repeat=6))).mean(1)
    assert (found["difference_low"], found["difference_high"]) == pytest.approx(
        tuple(np.percentile(means, [2.5, 97.5]))
    )


def test_the_p_value_of_a_bootstrap_by_enumeration():
    one, other = ONE + 0.5, OTHER + 0.5
    found = comparison.differences({"margin": one}, {"margin": other}, ["margin"], seed=0)["margin"]
    means = np.array(list(itertools.product(ONE - OTHER, repeat=6))).mean(1)
    assert found["test"] == "bootstrap"
    assert found["p_value"] == pytest.approx(2 * np.mean(means <= 0), abs=0.01)
    same = comparison.differences({"margin": one}, {"margin": one}, ["margin"], seed=0)["margin"]
    assert (same["difference"], same["p_value"]) == (0, 1)


@pytest.mark.parametrize(("only_one", "only_other"), [(0, 0), (1, 0), (4, 4), (2, 11), (30, 12), (700, 800)])
def test_mcnemar_is_the_binomial_test(only_one, only_other):
    total = only_one + only_other
    wanted = stats.binomtest(only_one, total).pvalue if total else 1.0
    assert comparison.mcnemar(only_one, only_other) == pytest.approx(wanted, rel=1e-9)


def test_the_interval_covers_the_difference_as_often_as_it_says():
    """Correlated values of 80 examples, 400 times. 95 % +- 3.3 % is three standard errors of the coverage."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(400):
        hard = rng.normal(size=80)
        one, other = (hard + rng.normal(mean, 0.5, 80) for mean in (0.2, 0.0))
        found = comparison.differences({"margin": one}, {"margin": other}, ["margin"], seed, count=500)["margin"]
        covered += found["difference_low"] <= 0.2 <= found["difference_high"]
    assert 0.917 <= covered / 400 <= 0.983


def scored(name, values, protocol="p", **metrics):
    result = {"artifact": name, "task": "t", "record": "r", "protocol": protocol, "metrics": metrics}
    return Scored(result, [], {k: np.asarray(v) for k, v in values.items()})


def documents(name, protocol="p", tokens=(2, 4), words=(1, 3), nll=(2.0, 4.0)):
    values = {"document_nll": nll, "document_tokens": tokens, "document_words": words, "document_bytes": (9, 9)}
    return scored(name, values, protocol, perplexity=2.7, word_perplexity=4.5, bits_per_byte=0.5)


def test_models_with_other_tokenizers_are_compared_per_word_and_byte():
    (found,) = comparison.compare([documents("a"), documents("b", tokens=(3, 5))], "b", 0, print)
    assert list(found["metrics"]) == ["word_perplexity", "bits_per_byte"]
    (found,) = comparison.compare([documents("a", nll=(3.0, 6.0)), documents("b")], "b", 7, print)
    assert list(found["metrics"]) == ["perplexity", "word_perplexity", "bits_per_byte"]
    assert found["metrics"]["perplexity"]["difference"] == pytest.approx(np.exp(1.5) - np.exp(1))
    assert (found["artifact"], found["against"], found["examples"], found["seed"]) == ("a", "b", 2, 7)


@pytest.mark.parametrize(
    ("other", "line"),
    [(documents("b", words=(1, 2)), "the examples differ"), (documents("b", protocol="q"), "the protocols differ")],
)
def test_other_examples_and_protocols_are_refused(other, line):
    with pytest.raises(RequestError, match=f"against: a and b on t: {line}"):
        comparison.compare([documents("a"), other], "b", 0, print)


def test_intervals_of_metrics_that_have_none_replace_those_of_an_earlier_bootstrap():
    label, prediction = np.array([0, 1, 1, 0] * 5), np.array([0, 1, 0, 0] * 5)
    values = {"label": label, "prediction": prediction, "accuracy": label == prediction}
    plain = scored("a", values, accuracy=0.75, accuracy_low=0.5, accuracy_high=0.9, macro_f1=11 / 15)
    found = with_intervals(plain, 1000, seed=0)
    metrics = found.result["metrics"]
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == (0.5, 0.9)
    assert 0.4 < metrics["macro_f1_low"] < 11 / 15 < metrics["macro_f1_high"] < 1
    assert found.result["bootstrap"] == {"resamples": 1000, "seed": 0, "metrics": ["macro_f1"]}
    assert with_intervals(found, 0, seed=0) == plain
    assert with_intervals(found, 1000, seed=0).result == found.result
