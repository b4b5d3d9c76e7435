"""The registry of metrics: what tables, headlines and the choice of the best checkpoint read."""

import pytest

from llmctl.evaluate import report
from llmctl.evaluate.metrics import base

RESULT = {
    "artifact": "a",
    "digest": "d",
    "protocol": "p",
    "parameters": 1,
    "weight_bytes": 4,
    "bytes": 3,
    "sparsity": 0.0,
    "bits": 32.0,
}


def result(task, **metrics):
    return {**RESULT, "task": task, "stage": "finetune", "metrics": metrics}


def test_records_are_complete():
    for name in base.METRICS.own:
        metric = base.METRICS[name]
        assert metric.name == name and metric.title and metric.text(0.5)
        # The best value of a score of bias is in the middle of its range. The others describe data or a control.
        described = name.startswith(("stereotype", "bias", "control_")) or name == "filtered"
        assert metric.table == "none" or metric.better != "neither" or described


@pytest.mark.parametrize(("name", "value", "says"), [
    ("accuracy", 0.8196, "81.96%"),
    ("latency_p50", 0.0125, "12.50"),  # seconds in JSON, milliseconds on paper
    ("perplexity", 12345.6784, "12,345.678"),
    ("validation_accuracy", 0.5, "50.00%"),
    ("text_words", 12, "12"),
    ("baseline_accuracy", 0.054, "5.40%"),  # as the metric that it is the baseline of
])  # fmt: skip
def test_a_value_is_printed_by_its_record(name, value, says):
    assert base.text(name, value) == says


def test_a_validation_metric_is_found_behind_its_prefix():
    found = base.find("validation_loss")
    assert found and (found.title, found.better) == ("val. loss", "minimize")
    assert base.find("validation_") is base.find("steps") is None


def test_tables_hold_one_another():
    narrow, wide = ({m.name for m in base.columns(base.METRICS, t)} for t in base.TABLES)
    assert narrow < wide and {"accuracy", "rmse", "exact_match", "recall_at_1"} <= narrow


def test_a_part_of_the_data_has_the_format_of_its_metric():
    part = base.find("accuracy/gender/female")
    assert part and (part.title, part.text(0.5), part.table) == ("accuracy (gender/female)", "50.00%", "none")
    assert base.find("nothing/gender") is None and base.columns(["accuracy/gender"], "file") == []


def test_columns_keep_the_order_of_the_registry():
    assert [m.name for m in base.columns(["perplexity", "nothing", "accuracy"], "run")] == ["accuracy", "perplexity"]


def test_a_headline_has_intervals_and_baselines():
    interval = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9}
    says = "classification: accuracy 80.00% (95 % interval 70.00% to 90.00%), macro F1 0.7500"
    assert report.headline(result("classification", **interval, macro_f1=0.75, examples_per_second=3.0)) == says
    says = "regression: RMSE 1.25 (baseline that ignores the input: 2.5), Pearson 0.500"
    assert report.headline(result("regression", rmse=1.25, baseline_rmse=2.5, pearson=0.5)) == says
    assert report.headline(result("perplexity", perplexity=None, nll=800.0)) == "perplexity: nats/token 800.0000"


def test_a_table_has_what_there_is_room_for():
    metrics = {"exact_match": 0.5, "latency_p50": 0.0125, "windows": 3}
    head, body = report.cells([result("answers", **metrics)])
    assert head == [
        "artifact",
        "stage",
        "parameters",
        "weight bytes",
        "bytes on disk",
        "sparsity",
        "bits",
        "exact match",
        "p50 ms",
    ]
    assert body == [["a", "finetune", "1", "4", "3", "–", "32", "50.00%", "12.50"]]
