"""The picture of every kind of result: with an interval, without one, with numbers that are missing."""

import pytest

from llmctl.evaluate import tradeoff_plot


def result(name, size, task="t", **metrics):
    return {"artifact": name, "digest": name, "weight_bytes": size, "task": task, "protocol": "p", "metrics": metrics}


INTERVAL = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9}
CASES = {
    "classifiers": [result("a", 900, **INTERVAL, examples_per_second=3.0), result("b", 100, **INTERVAL)],
    "taggers": [result("a", 900, accuracy=0.8, macro_f1=0.7, examples_per_second=3.0), result("b", 90, accuracy=0.7)],
    "both": [result("a", 900, accuracy=0.8), result("b", 100, **INTERVAL)],
    "perplexities": [
        result("a", 900, perplexity=8.0),
        result("b", 100, perplexity=None),
        result("c", 90, perplexity=9),
    ],
    "two tasks": [
        result("a", 900, task="one", token_accuracy=0.5),
        result("a", 900, task="two", token_accuracy=0.25),
        result("b", 100, task="one", token_accuracy=0.4),
    ],
    "numbers": [result("a", 900, rmse=1.5, pearson=0.5), result("b", 100, rmse=2.0, pearson=0.25)],
}


@pytest.mark.parametrize("results", CASES.values(), ids=CASES)
def test_what_was_measured_is_drawn(results, tmp_path):
    assert tradeoff_plot.tradeoff(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_neither_is_not(tmp_path):
    for metrics in ({"examples_per_second": 1.0}, {"perplexity": None}):
        assert not tradeoff_plot.tradeoff([result("a", 900, **metrics)], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_every_task_of_an_artifact_is_a_point_with_its_name(monkeypatch, tmp_path):
    points = []
    monkeypatch.setattr(tradeoff_plot, "_draw", lambda ax, records, x, metric: points.extend(records))
    assert tradeoff_plot.tradeoff(CASES["two tasks"], tmp_path / "x.png")
    assert [(r["artifact"], r["task"], r["token_accuracy"]) for r in points] == [
        ("a", "one", 0.5), ("a", "two", 0.25), ("b", "one", 0.4),
    ]  # fmt: skip
