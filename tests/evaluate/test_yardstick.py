"""The yardstick of eval: its features and its optimum computed by hand, and its place in the results."""

import itertools
import json
import math

import numpy as np
import pytest

from llmctl.cli import summary
from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.evaluate import report, yardstick
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.stored import Stored
from llmctl.evaluate.tasks.registry import TASKS

TRAIN = [("good good film", "pos"), ("good plot", "pos"), ("bad film", "neg"), ("bad bad plot", "neg")]
HELD = [("good film", "pos"), ("bad plot", "neg"), ("plot bad film", "pos")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", TRAIN), ("test", HELD)):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    files = {"path": str(folder / "train.jsonl"), "test_path": str(folder / "test.jsonl")}
    return splits.load(DataConfig(source="jsonl", validation=0.0, dedup=False, **files))


def measure(data, before=(), **settings):
    config = MeasureConfig(**{"yardstick": "words", "repeats": 1, "batch_size": 2} | settings)
    return yardstick.measure(config, data, data["test"], Stored(list(before)))


def counts(text):
    words = text.split()
    terms = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return {term: terms.count(term) for term in terms}


def features(texts, terms):
    """(1 + log count) * (log((1 + n) / (1 + texts with the term)) + 1), scaled to length 1."""
    having = {t: sum(t in counts(text) for text, _ in TRAIN) for t in terms}
    x = np.zeros((len(texts), len(terms)))
    for i, text in enumerate(texts):
        for term, count in counts(text).items():
            if term in terms:
                idf = math.log((1 + len(TRAIN)) / (1 + having[term])) + 1
                x[i, terms.index(term)] = (1 + math.log(count)) * idf
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_features_and_optimum_by_hand(data):
    """At the minimum of the loss, C * sum((p - y) x) + w = 0 and sum(p - y) = 0."""
    model = yardstick.TfidfClassifier("words", data["train"])
    terms = sorted({term for text, _ in TRAIN for term in counts(text)})
    assert list(model.vectorizers[0].get_feature_names_out()) == terms
    w, b = model.regression.coef_[0], model.regression.intercept_[0]
    texts = list(data["train"].texts())
    x, y = features(texts, terms), np.asarray(data["train"].labels)
    p = 1 / (1 + np.exp(-(x @ w + b)))
    assert yardstick.INVERSE_PENALTY * (p - y) @ x + w == pytest.approx(np.zeros(len(terms)), abs=2e-3)
    assert (p - y).sum() == pytest.approx(0, abs=1e-4)
    held = [text for text, _ in HELD]
    logits = model.logits([held])
    assert logits[:, 1] - logits[:, 0] == pytest.approx(features(held, terms) @ w + b, abs=1e-5)
    assert sum(a.size for a in model.arrays) == 2 * len(terms) + 1


def test_the_result_is_that_of_an_artifact(data):
    found = measure(data)
    result, metrics = found.result, found.result["metrics"]
    # Class 0 is neg; the third text is called neg, because "plot bad film" has "bad".
    assert metrics["confusion"] == [[1, 0], [1, 1]] and metrics["accuracy"] == pytest.approx(2 / 3)
    assert (result["artifact"], result["stage"], result["task"]) == ("yardstick", "yardstick", "classification")
    assert result["weight_bytes"] == 4 * result["parameters"] and result["bytes"] > 0
    assert metrics["latency_p50"] > 0 and metrics["examples_per_second"] > 0
    assert [record["text"] for record in found.records] == ["plot bad film"]
    assert found.values["accuracy"].tolist() == [1, 1, 0]
    assert "trained on 4 examples" in result["protocol"]
    assert measure(data, [found]) is found
    again = measure(data, [found], yardstick="characters")
    assert again is not found and again.result["definition"] != result["definition"]
    assert report.cells([result])[1][0][0] == "yardstick"


def test_a_run_lists_it_after_its_artifacts(data, tmp_path):
    result = measure(data).result
    file = tmp_path / "results.json"
    file.write_text(json.dumps([result]))
    shown = summary.results(tmp_path)
    assert shown[0]["parameters"] == result["parameters"]
    file.write_text(json.dumps([{k: v for k, v in result.items() if k != "bytes"}]))
    with pytest.raises(RequestError, match="damaged"):
        summary.results(tmp_path)


def test_what_it_refuses(data):
    with pytest.raises(RequestError, match="no artifact is measured on the task classify"):
        yardstick.check(MeasureConfig(yardstick="words"), [TASKS["causal"], TASKS["multilabel"]])
    with pytest.raises(RequestError, match="trained on the train split"):
        yardstick.check(MeasureConfig(yardstick="words", split="train"), [TASKS["classify"]])
    one_class = data["train"].take(np.array([0, 1]))
    with pytest.raises(RequestError, match="cannot be trained on the train split"):
        yardstick.TfidfClassifier("words", one_class)
