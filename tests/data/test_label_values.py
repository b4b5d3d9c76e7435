"""Test what a label cell may be: its types, one spelling per class, and cells that hold no label."""

import decimal
import json

import numpy as np
import pytest

from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.data import label_values, splits
from llmctl.data.config import DataConfig
from llmctl.evaluate.setup import label_map

NAN = float("nan")


def load(path, rows, **kw):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return splits.load(DataConfig(source="jsonl", path=str(path), **{"validation": 0, "test": 0} | kw))


def labelled(path, labels, **kw):
    return load(path, [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)], **kw)


@pytest.mark.parametrize(
    ("label", "spelled"),
    [
        ("1", "1"), ("1.0", "1"), ("1.", "1"), ("+1", "1"), ("-0.0", "0"), ("-2.00", "-2"), (" 1 ", "1"),
        ("True", "true"), ("FALSE", "false"), ("01", "01"), ("1.10", "1.10"), ("1.5", "1.5"), ("1e3", "1e3"),
        (" pos", "pos"), ("Pos", "Pos"), ("cafe\u0301", "caf\u00e9"), ("\u0661", "\u0661"),
    ],
)  # fmt: skip
def test_canonical_spelling(label, spelled):
    assert label_values.canonical(label) == spelled


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [
        ([True, "true", "True", False], ("false", "true"), [1, 1, 1, 0]),
        ([1, 1.0, "1", "1.0", 0], ("0", "1"), [1, 1, 1, 1, 0]),
        (["1.0", "10.0", "2.0"], ("1.0", "10.0", "2.0"), [0, 1, 2]),  # alike in all rows: as they are written
        (["1.0", "2.0", 1], ("1", "2"), [0, 1, 0]),  # one class in two spellings: all classes are canonical
        ([-1, 1, -1], ("-1", "1"), [0, 1, 0]),
        ([-2, -1, 0], ("-2", "-1", "0"), [0, 1, 2]),
        (["Pos", "pos"], ("Pos", "pos"), [0, 1]),
    ],
)
def test_a_class_has_one_spelling(tmp_path, labels, classes, indices):
    found = labelled(tmp_path / "x.jsonl", labels)
    assert found.classes == classes
    assert found["train"].labels.tolist() == indices


def test_listed_classes_give_the_names(tmp_path):
    found = labelled(tmp_path / "x.jsonl", [1, "True", 0.5], classes=["0.5", "1.0", "true"])
    assert (found.classes, found["train"].labels.tolist()) == (("0.5", "1.0", "true"), [1, 2, 0])
    with pytest.raises(RequestError, match=r"x.jsonl:1: label '2' is not among data.classes \(1.0, 3\)"):
        labelled(tmp_path / "x.jsonl", [2.0], classes=["1.0", "3"])
    assert label_map(("1", "0"), ["0.0", "1.0"], "a").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("label", "kw", "message"),
    [
        ([0], {}, r'label \[0\] is no class but a list in column \'label\'; data.label_type = "set" reads'),
        ({"id": 0}, {}, r"label \{'id': 0\} is no class but an object in column 'label'; write the name"),
        (0.5, {}, r'label 0.5 is no class but a number in column \'label\'; data.label_type = "number" reads'),
        (float("inf"), {}, "label inf is no class but a number"),
        (None, {}, r"the label is empty \(column 'label' holds null\); data.unlabeled = \"drop\" drops"),
        (NAN, {}, r"the label is empty \(column 'label' holds nan\)"),
        ("  ", {}, r"the label is empty \(column 'label' holds '  '\)"),
        (1e39, {"label_type": "number"}, "label 1e\\+39 is beyond the numbers of float32"),
        (10**400, {"label_type": "number"}, r"label 1000+\.\.\. is not a number"),
        ("1_0", {"label_type": "number"}, "label '1_0' is not a number"),
        ([1.0], {"label_type": "number"}, r"label \[1.0\] is not a number"),
        (NAN, {"label_type": "number"}, "the label is empty"),
        ([0, 1, 0], {"label_type": "set"}, r"label .* in column 'label' holds zeros and ones for all classes; list"),
        ([True, False], {"label_type": "set"}, r"label .* zeros and ones for all classes"),
        ([["a"]], {"label_type": "set"}, r"label \['a'\] is no class but a list"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path, label, kw, message):
    with pytest.raises(RequestError, match=r"x.jsonl:2: " + message):
        labelled(tmp_path / "x.jsonl", [["a"] if kw.get("label_type") == "set" else 1, label], **kw)


@pytest.mark.parametrize("value", [b"a", decimal.Decimal("0.5"), np.array([1, 2]), np.datetime64("2020-01-01")])
def test_values_of_other_formats_are_refused(value):
    with pytest.raises(RequestError, match="is no class but"):
        label_values.Labels(DataConfig(), "label").label(value)


def test_values_of_other_formats_are_read():
    classes, numbers = (label_values.Labels(DataConfig(label_type=t), "x") for t in ("class", "number"))
    assert [classes.label(v) for v in (np.float32(2), decimal.Decimal("2.0"), np.int8(2), np.True_)] == [
        *"222",
        "true",
    ]
    assert [numbers.label(v) for v in (np.float32(0.5), decimal.Decimal("0.5"), " 0.5 ", True)] == [0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, -1, 0], "x.jsonl:2: label '-1' stands for no label in many data sets; data.unlabeled"),
        ([1, 0, "-1.0", -1], "x.jsonl:3: label '-1' stands for no label"),
        ([0, -100], "x.jsonl:2: label '-100' stands for no label"),
        ([1, True, 0], r"the labels are both truth values \(true\) and numbers \(0, 1\)"),
    ],
)
def test_ambiguous_labels_are_refused(tmp_path, labels, message):
    with pytest.raises(RequestError, match=message):
        labelled(tmp_path / "x.jsonl", labels)
    listed = ["-100", "-1", "0", "1", "true"]
    assert len(labelled(tmp_path / "x.jsonl", labels, classes=listed)["train"]) == len(labels)
    with pytest.raises(RequestError, match=message.replace(":2:", ":1:").replace(":3:", ":1:")):
        rows = [{"tokens": ["a"] * len(labels), "tags": labels}]
        load(tmp_path / "x.jsonl", rows)


@pytest.mark.parametrize(
    ("labels", "kw", "kept"),
    [
        ([0, None, 1, -1, "", NAN, -100], {}, [0, 1]),
        ([0, -1, 1], {"classes": ["-1", "0", "1"]}, [1, 0, 2]),
        ([0.5, None, -1, "nan", ""], {"label_type": "number"}, [0.5, -1.0]),
        ([["a"], None, [], ["a", -1]], {"label_type": "set"}, [[1], [0]]),
    ],
)
def test_rows_without_a_label_are_dropped_if_asked(tmp_path, labels, kw, kept):
    found = labelled(tmp_path / "x.jsonl", labels, unlabeled="drop", **kw)
    assert found["train"].labels.tolist() == kept
    assert found.unlabeled == len(labels) - len(kept)
    assert "unlabeled" not in keyed(DataConfig())  # older keys stay


def test_words_without_a_label_drop_their_row(tmp_path):
    tags = [["O", "X"], ["O", None], [-100, "X"], None, ["X", "O"]]
    rows = [{"tokens": ["a", str(i)], "tags": t} for i, t in enumerate(tags)] + [{"tokens": ["c"]}]
    with pytest.raises(RequestError, match=r"x.jsonl:2: the label is empty"):
        load(tmp_path / "x.jsonl", rows)
    found = load(tmp_path / "x.jsonl", rows, unlabeled="drop")
    assert [row["tags"] for row in found["train"]] == [["O", "X"], ["X", "O"]]
    assert found.unlabeled == 4


def test_words_have_one_spelling_per_class(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": [1, "1.0"]}, {"tokens": ["c"], "tags": ["0.0"]}]
    found = load(tmp_path / "x.jsonl", rows)
    assert found.classes == ("0", "1")
    assert [row["tags"] for row in found["train"]] == [["1", "1"], ["0"]]
    assert load(tmp_path / "x.jsonl", rows, classes=["1.0", "0"])["train"][0]["tags"] == ["1.0", "1.0"]
    with pytest.raises(RequestError, match=r"x.jsonl:1: label \['b'\] is no class but a list in column 'tags'"):
        load(tmp_path / "x.jsonl", [{"tokens": ["a"], "tags": [["b"]]}])


def test_text_to_pretrain_on_may_have_any_labels(tmp_path):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([None, [1], {"a": 1}, -1, 0])]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = splits.load(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), validation=0, test=0), labels=False)
    assert (found["train"].columns, len(found["train"]), found["train"].labels) == (("text",), 5, None)


def test_a_label_that_no_file_can_hold():
    """The artifact failed when it was saved."""
    with pytest.raises(RequestError, match=r"label 'a\\ud800' in column 'label': not UTF-8 text"):
        label_values.Labels(DataConfig(), "label").of_class("a\ud800")
