"""Test splits by content: deduplication, independence of order and filters, labels, and every invalid request."""

import csv
import hashlib
import json

import numpy as np
import pytest

from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.data import dedup, splits, write_splits
from llmctl.data.config import SENTENCE_PAIRS, DataConfig, SourceConfig
from llmctl.data.sources import jsonl

FILM = int.from_bytes(hashlib.sha256(b"thefilmwasgreat").digest()[:6], "big") / 2**48
COLUMNS = {"text": "review", "label": "stars"}


def load(path, **kw):
    given = {"source": "csv", "columns": COLUMNS, "validation": 0.2, "test": 0.2}
    return splits.load(DataConfig(path=str(path), **(given | kw)))


def where(found):
    """Map each text to its split."""
    return {t: name for name, examples in found.examples.items() for t in examples.texts()}


def write(path, rows, header=("review", "stars", "site")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_the_fraction_is_written_down():
    # sha256("thefilmwasgreat")[:6] / 2^48. Another value would move texts between the splits of existing artifacts.
    for spelling in ("The film was great.", "the  FILM, was<br />great", "the film was gre\uff41t!"):
        assert dedup.fraction(spelling) == pytest.approx(FILM, abs=1e-12)
    assert dedup.fraction("...") != dedup.fraction("?!")
    assert 0 <= dedup.fraction("漢字") < 1


def test_splits_have_their_sizes_and_share_no_text(reviews):
    found = load(reviews)
    sizes = {name: len(e) for name, e in found.examples.items()}
    assert sum(sizes.values()) == 600
    assert 90 < sizes["validation"] < 150
    assert 90 < sizes["test"] < 150
    texts = [{dedup.normalize(t) for t in e.texts()} for e in found.examples.values()]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]


def test_a_text_keeps_its_split(reviews, tmp_path):
    base = where(load(reviews))
    rows = list(csv.reader(reviews.read_text().splitlines()))[1:]
    turned = write(tmp_path / "turned.csv", reversed(rows))
    assert where(load(turned)) == base
    some = where(load(reviews, filter={"site": "b"}))
    assert some.items() < base.items()
    cleaned = where(load(reviews, replace={".": "", " the ": " THE "}))
    assert sorted(cleaned.values()) == sorted(base.values())
    # Another validation fraction does not change the test split.
    other = where(load(reviews, validation=0.1))
    assert {t for t, s in other.items() if s == "test"} == {t for t, s in base.items() if s == "test"}


def test_the_first_of_our_columns_decides_the_split_however_they_are_written_down(tmp_path, sentences):
    rows = [[s, t] for s, t in zip(sentences[:200], reversed(sentences[:200]), strict=True)]
    path = write(tmp_path / "x.csv", rows, header=("a", "b"))
    orders = [{"text": "a", "pair": "b"}, {"pair": "b", "text": "a"}]
    one, other = (load(path, columns=columns) for columns in orders)
    assert where(one) == where(other)
    assert one["train"].digest == other["train"].digest
    parts = [SourceConfig(source="csv", path=str(path), columns=columns) for columns in orders]
    assert splits.load(DataConfig(mixture=parts)).duplicates == 200


def test_rows_that_are_left_out_are_counted_by_reason(tmp_path, sentences):
    rows = [[s, 0, "a"] for s in sentences[:50]] + [[sentences[0], 0, "a"], ["  ", 1, "a"], ["other", 1, "b"]]
    found = load(write(tmp_path / "x.csv", rows), filter={"site": "a"}, test=0.0, validation=0.0)
    assert found.describe() == "53 rows: 50 train, 0 validation, 0 test; left out: 1 duplicates, 1 filtered, 1 blank"


def test_duplicates_are_dropped_before_splitting(tmp_path, sentences):
    rows = [[s, 0, "a"] for s in sentences[:50]] + [[s.upper().replace(" ", "  "), 1, "a"] for s in sentences[:50]]
    path = write(tmp_path / "twice.csv", [*rows, ["  ", 0, "a"]])
    found = load(path)
    assert (found.rows, found.duplicates, found.blank, found.filtered) == (101, 50, 1, 0)
    assert sum(map(len, found.examples.values())) == 50
    kept = load(path, dedup=False)
    assert sum(map(len, kept.examples.values())) == 100
    # Duplicates that are kept are all in one split.
    for examples in kept.examples.values():
        texts = [dedup.normalize(t) for t in examples.texts()]
        assert all(texts.count(t) == 2 for t in texts)


def test_examples_hold_canonical_columns_and_class_indices(tmp_path):
    path = write(tmp_path / "x.csv", [["good<br />film", "pos", "a"], ["bad film", "neg", "a"], ["fine", "pos", "b"]])
    kw = {"replace": {"<br />": " "}, "validation": 0, "test": 0}
    found = load(path, **kw)
    assert found.classes == ("neg", "pos")
    assert list(found["train"]) == [
        {"text": "good film", "label": 1}, {"text": "bad film", "label": 0}, {"text": "fine", "label": 1},
    ]  # fmt: skip
    assert load(path, classes=["pos", "neg"], **kw)["train"].labels.tolist() == [0, 1, 0]
    numbers = write(tmp_path / "n.csv", [["a", "10", ""], ["b", "9", ""], ["c", "-1", ""]])
    assert load(numbers, **kw).classes == ("-1", "9", "10")
    assert load(numbers, label_type="number", **kw)["train"].labels.tolist() == [10.0, 9.0, -1.0]
    assert load(numbers, label_type="number", **kw).classes == ()


def given(tmp_path, rows, **kw):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return splits.load(DataConfig(source="jsonl", path=str(path), **{"validation": 0, "test": 0} | kw))


@pytest.mark.parametrize("names", SENTENCE_PAIRS, ids="-".join)
def test_sentence_pairs_of_well_known_data_are_found(names, tmp_path):
    rows = [dict(zip((*names, "label"), (f"a{i}", f"b{i}", i % 2), strict=True)) for i in range(3)]
    found = given(tmp_path, rows)["train"]
    assert found.columns == ("text", "pair", "label")
    assert list(found) == [{"text": f"a{i}", "pair": f"b{i}", "label": i % 2} for i in range(3)]
    own = given(tmp_path, [row | {"text": "t"} for row in rows])["train"]
    assert own.columns[0] == "text" and own[0]["text"] == "t" and "pair" not in own.columns
    swapped = given(tmp_path, rows, columns={"text": names[1], "label": "label"})["train"]
    assert swapped.columns == ("text", "label") and swapped[0]["text"] == "b0"


def test_columns_may_be_absent_from_the_first_row(tmp_path):
    rows = [{"text": "a", "label": 0}, {"label": 1, "pair": "c", "text": "b"}]
    found = given(tmp_path, rows)["train"]
    assert found.columns == ("text", "pair", "label")
    assert list(found) == [{"text": "a", "pair": "", "label": 0}, {"text": "b", "pair": "c", "label": 1}]
    with pytest.raises(RequestError, match=r"x.jsonl:1: no column 'label'"):
        given(tmp_path, [{"text": "a"}, *rows])
    assert given(tmp_path, [{"text": "a"}, *rows], unlabeled="drop").unlabeled == 1
    with pytest.raises(RequestError, match=r"x.jsonl:2: no column 'text', did you mean 'txt'"):
        given(tmp_path, [rows[0], {"txt": "b", "label": 1}])


def test_a_column_after_the_first_rows_is_refused_or_read_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "ROWS", 2)
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 0}, {"text": "c", "label": 1, "pair": "d", "tags": []}]
    with pytest.raises(RequestError, match=r'x.jsonl:3: column \'pair\' is in none .* pair = "pair" \}'):
        given(tmp_path, rows)
    columns = {c: c for c in ("text", "label", "pair")}
    assert [r["pair"] for r in given(tmp_path, rows, columns=columns)["train"]] == ["", "", "d"]
    with pytest.raises(RequestError, match=r"no column 'pairs' \(columns: text, label\)"):
        given(tmp_path, rows, columns={"text": "text", "pair": "pairs"})


@pytest.mark.parametrize(
    ("wanted", "kept"), [(1, "abcd"), ("1", "acd"), ("1.0", "bcd"), (True, "ef"), ("true", "f"), ([0, "True"], "ef")]
)
def test_a_filter_compares_values_and_spellings_of_text(tmp_path, wanted, kept):
    rows = [{"text": t, "n": n} for t, n in zip("abcdef", ["1", "1.0", 1, 1.0, "True", True], strict=True)]
    assert "".join(r["text"] for r in given(tmp_path, rows, filter={"n": wanted})["train"]) == kept


def test_sample_is_stable_and_spread(reviews):
    train = load(reviews)["train"]
    small, large = train.sample(20), train.sample(100)
    assert len(small) == 20
    assert set(small.texts()) < set(large.texts())
    assert 5 < small.labels.sum() < 15
    assert train.sample(10**6) is train
    assert train[:3].digest != train[:2].digest
    assert load(reviews)["train"].digest == train.digest


def test_a_few_examples_per_class(reviews):
    whole, few = load(reviews), load(reviews, examples_per_class=5)
    assert np.bincount(few["train"].labels).tolist() == [5, 5]
    assert where(few).items() <= where(whole).items() and len(few["test"]) == len(whole["test"])
    again, other = load(reviews, examples_per_class=5), load(reviews, examples_per_class=5, examples_seed=1)
    assert few["train"].index.tolist() == again["train"].index.tolist() != other["train"].index.tolist()
    assert set(few["train"].index) < set(load(reviews, examples_per_class=6)["train"].index)
    with pytest.raises(RequestError, match=r"examples_per_class = 9999: the train split has \d+ examples of class '0'"):
        load(reviews, examples_per_class=9999)
    with pytest.raises(RequestError, match="needs data with one class per row"):
        load(reviews, examples_per_class=1, columns={"text": "review"})


def test_a_mixture_keeps_its_parts(tmp_path, sentences):
    for name, part in (("one", sentences[:100]), ("two", sentences[50:200])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    sources = [
        SourceConfig(path=str(tmp_path / f"{name}.txt"), documents="line", weight=w)
        for name, w in (("one", 3), ("two", 1))
    ]
    found = splits.load(DataConfig(mixture=sources))
    assert found.duplicates == 50
    parts = found["train"].parts()
    assert [p for p, _ in parts] == [0, 1]
    assert sum(len(p) for _, p in parts) == len(found["train"])
    assert set(parts[0][1].texts()) <= set(sentences[:100])
    assert set(parts[1][1].texts()) <= set(sentences[100:200])
    assert np.all(np.diff(found["train"].index) > 0)


SETS = ["b, a", "", "c", "a,a"]


@pytest.mark.parametrize("separated", [True, False])
def test_sets_of_labels_become_a_row_of_zeros_and_ones(tmp_path, separated):
    parts = [[p.strip() for p in s.split(",") if p] for s in SETS]
    rows = [{"text": f"text {i}", "label": given} for i, given in enumerate(SETS if separated else parts)]
    path = tmp_path / "sets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"source": "jsonl", "columns": {}, "label_type": "set", "validation": 0, "test": 0}
    found = load(path, label_separator="," * separated, **given)["train"]
    assert found.classes == ("a", "b", "c")
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
    assert found[2]["label"] == [0, 0, 1]
    assert found.take(np.array([3, 0])).labels.tolist() == [[1, 0, 0], [1, 1, 0]]
    ordered = load(path, label_separator="," * separated, classes=["d", "c", "b", "a"], **given)["train"]
    np.testing.assert_array_equal(ordered.labels, [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(RequestError, match=r"sets.jsonl:3: label 'c' is not among data.classes \(a, b\)"):
        load(path, label_separator="," * separated, classes=["a", "b"], **given)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("a,b", "label 'a,b' is no list of labels; set data.label_separator"),
        (None, r"label None is no list of labels; \[\] is the empty set"),
        (["a", None], "the label is empty"),
    ],
)
def test_what_is_no_set_of_labels_is_refused(tmp_path, label, message):
    path = tmp_path / "sets.jsonl"
    path.write_text(json.dumps({"text": "one", "label": label}) + "\n")
    with pytest.raises(RequestError, match=message):
        load(path, source="jsonl", columns={}, label_type="set")


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"columns": {"text": "reviews"}}, r"no column 'reviews', did you mean 'review'\? \(columns: review, stars"),
        ({"columns": {"txt": "review"}}, "unknown column 'txt', did you mean 'text'"),
        ({"columns": {}}, 'none of its columns is a text column; set data.columns, such as {text = "review"}'),
        ({"filter": {"sites": "a"}}, "no column 'sites', did you mean 'site'"),
        ({"filter": {"site": "c"}}, r"no text in it \(600 rows, 600 filtered out, 0 blank\)"),
        ({"classes": ["1", "2"]}, r"reviews.csv:2: label '0' is not among data.classes \(1, 2\)"),
        ({"columns": {"text": "stars", "label": "review"}, "label_type": "number"}, "is not a number"),
        ({"label_type": "number", "path": "gaps.csv"}, r"gaps.csv:3: label 'nan' is not a number"),
    ],
)  # fmt: skip
def test_wrong_requests(reviews, kw, message):
    write(reviews.parent / "gaps.csv", [["good", "0.5", "a"], ["bad", "nan", "a"]])
    path = reviews.parent / kw.get("path", "reviews.csv")
    with pytest.raises(RequestError, match=message):
        load(path, **{k: v for k, v in kw.items() if k != "path"})


@pytest.mark.parametrize("said", [{"role": "user", "content": "hi"}, {"from": "human", "value": "hi"}])
@pytest.mark.parametrize("columns", [{}, {"text": "messages"}])
def test_chats_are_refused_with_what_works(said, columns, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a", "messages": [said]}) + "\n")
    with pytest.raises(RequestError, match=r"'messages' holds chats, which task = .chat. reads"):
        splits.load(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), columns=columns))


def test_advice_names_a_column_that_holds_text(tmp_path):
    for row, message in (({"n": 1, "body": "b"}, r'\{text = "body"\}'), ({"n": 1}, "none of its columns holds text")):
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(RequestError, match=message):
            splits.load(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl")))


def test_empty_and_missing(tmp_path, reviews):
    with pytest.raises(RequestError, match=r"no such file: '.*review.csv', did you mean 'reviews.csv'"):
        load(tmp_path / "review.csv")
    with pytest.raises(RequestError, match=r'no column .*; set data.source = "csv" to read its columns'):
        load(reviews, source="text")
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(RequestError, match=r'split is empty .*; data.documents = "paragraph" or "line"'):
        load(tmp_path / "one.txt", source="text", columns={}, test=0)["validation"]
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(RequestError, match=r"empty.csv: no text in it \(0 rows"):
        load(tmp_path / "empty.csv")
    with pytest.raises(RequestError, match=r"the test split is empty \(data.test = 0.0"):
        load(reviews, test=0)["test"]
    with pytest.raises(RequestError, match=r"no split 'tests', did you mean 'test'"):
        load(reviews)["tests"]
    with pytest.raises(RequestError, match=r"the data has no column 'prompt'"):
        load(reviews)["train"].texts("prompt")
    missing = write(tmp_path / "gap.csv", [["text", "", "a"]])
    with pytest.raises(RequestError, match=r"gap.csv:2: the label is empty"):
        load(missing)
    with pytest.raises(RequestError, match=r"data has no path"):
        splits.load(DataConfig())


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude42 \u00e9"}')
    found = splits.load(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), validation=0, test=0))
    assert list(found["train"].texts()) == ["a \ufffd b \U0001f642 \u00e9"]


def test_sources_of_a_mixture_must_agree(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    sources = [SourceConfig(source="jsonl", path=str(tmp_path / f"{n}.jsonl")) for n in "ab"]
    with pytest.raises(RequestError, match=r"must have the same columns, these have text, label; text"):
        splits.load(DataConfig(mixture=sources))


def test_configs_refuse_what_cannot_be():
    with pytest.raises(ValueError, match=r"leave nothing to train on"):
        DataConfig(validation=0.5, test=0.5)
    with pytest.raises(ValueError, match=r"exclude each other"):
        DataConfig(path="x", mixture=[SourceConfig(path="y")])
    with pytest.raises(ValueError, match=r"columns, replace and mixture exclude each other"):
        DataConfig(columns={"text": "a"}, replace={"<br />": " "}, mixture=[SourceConfig(path="y")])
    with pytest.raises(ValueError, match=r"listed twice"):
        DataConfig(classes=["a", "a"])


def test_inputs_are_the_files(reviews):
    assert DataConfig(path=str(reviews)).inputs() == [str(reviews)]
    assert DataConfig(mixture=[SourceConfig(path=str(reviews.parent / "*.csv"))]).inputs() == [str(reviews)]
    with pytest.raises(RequestError, match=r"no file matches"):
        DataConfig(path=str(reviews.parent / "*.tsv")).inputs()


def test_splits_may_have_their_own_files(tmp_path):
    """A text that the test file shares with the others counts there alone; fractions of that split no longer apply."""
    train = write(tmp_path / "train.csv", [(f"text {i}", "good", "a") for i in range(40)])
    test = write(tmp_path / "test.csv", [("text 3", "good", "a"), ("other", "bad", "a")])
    valid = write(tmp_path / "valid.csv", [("text 3", "good", "a"), ("third", "bad", "a")])
    found = load(train, test_path=str(test), validation=0.0)
    assert sorted(found["test"].texts()) == ["other", "text 3"] and len(found["train"]) == 39
    found = load(train, test_path=str(test), validation_path=str(valid))
    assert sorted(found["test"].texts()) == ["other", "text 3"] and list(found["validation"].texts()) == ["third"]
    assert len(found["train"]) == 39 and found.classes == ("bad", "good")
    cfg = DataConfig(source="csv", path=str(train), columns=COLUMNS, test_path=str(test))
    assert cfg.inputs() == [str(train), str(test)]  # the content of both is part of a stage's key
    assert "test_path" not in keyed(DataConfig()) and "test_path" in keyed(cfg)
    for wrong, message in (
        ({"source": "prepared", "test_path": "x"}, "test_path: not for prepared data"),
        ({"source": "csv", "test_split": "test"}, "only sources tfds and hf have splits"),
        ({"mixture": [SourceConfig()], "test_path": "x"}, "test_path and mixture exclude"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**wrong)


def test_texts_of_held_out_files_are_never_trained_on(tmp_path):
    """Also without deduplication: repeated texts stay, and only those of the held-out files go."""
    rows = [("good film", "good", "a")] * 3 + [("bad film", "bad", "a")] * 2
    train = write(tmp_path / "train.csv", rows)
    test = write(tmp_path / "test.csv", [("GOOD  film", "good", "a")] * 2)
    found = load(train, test_path=str(test), validation=0.0, dedup=False)
    assert list(found["train"].texts()) == ["bad film"] * 2 and found.duplicates == 3
    assert list(found["test"].texts()) == ["GOOD  film"] * 2
    assert len(load(train, test=0.0, validation=0.0, dedup=False)["train"]) == 5


def test_the_data_of_an_evaluation_may_be_all_test(reviews):
    found = load(reviews, test=1.0)
    assert len(found["test"]) == 600 and not len(found.examples["train"]) + len(found.examples["validation"])
    with pytest.raises(ValueError, match="leave nothing to train on"):
        DataConfig(test=0.9, validation=0.1)


def test_written_splits_are_read_as_the_same_splits(reviews, tmp_path):
    found = load(reviews)
    cfg = found.config
    wrote, _ = write_splits.write(cfg, tmp_path / "out")
    assert {split: n for split, (_, n) in wrote.items()} == {s: len(e) for s, e in found.examples.items()}
    paths = {f"{split}_path": str(wrote[split][0]) for split in ("validation", "test")}
    again = splits.load(DataConfig(source="jsonl", path=str(wrote["train"][0]), **paths))
    assert again.classes == found.classes
    for split, examples in found.examples.items():
        assert [(r["text"], r["label"]) for r in again[split]] == [(r["text"], r["label"]) for r in examples]
    with pytest.raises(RequestError, match="is there already"):
        write_splits.write(cfg, tmp_path / "out")
