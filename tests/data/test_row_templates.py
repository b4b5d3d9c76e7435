"""Columns that templates make: their texts, the split of their rows, class names, and what is refused."""

import csv

import pytest

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.data.examples.synthetic import SyntheticText
from llmctl.evaluate.tasks.registry import TASKS

TEMPLATE = {"prompt": "{{ text }}\nIt was", "completion": " {{ words[label] }}"}
WORDS = {"pos": "great", "neg": "bad"}


@pytest.fixture
def reviews(tmp_path):
    def write(rows, name="x.csv"):
        with (tmp_path / name).open("w", newline="") as f:
            csv.writer(f).writerows([("review", "mark"), *rows])
        return str(tmp_path / name)

    return write


def loaded(path, labels=False, **settings):
    given = {"source": "csv", "path": path, "columns": {"text": "review", "label": "mark"}, "validation": 0, "test": 0}
    return splits.load(DataConfig(**given, **settings), labels=labels)


def test_labelled_texts_become_prompts_and_completions(reviews):
    path = reviews([("Loved it.", "pos"), ("Left early.", "neg")])
    found = loaded(path, template=TEMPLATE, words=WORDS)["train"]
    assert found.columns == ("text", "prompt", "completion")
    assert list(found.texts("prompt")) == ["Loved it.\nIt was", "Left early.\nIt was"]
    assert list(found.texts("completion")) == [" great", " bad"]
    # A task with labels reads the same rows with their classes.
    assert loaded(path, labels=True, template=TEMPLATE, words=WORDS).classes == ("neg", "pos")
    # Other columns of the source, and a text that is made anew.
    made = loaded(path, template={"text": "{{ text | upper }} {{ row.mark }}"})["train"]
    assert list(made.texts()) == ["LOVED IT. pos", "LEFT EARLY. neg"]


@pytest.mark.parametrize("template", [TEMPLATE, {"text": "Review: {{ text }}"}, {"prompt": "{{ label }} {{ text }}"}])
def test_the_split_is_that_of_the_text_before_templates(reviews, template):
    path = reviews([(f"review number {i}", "pos" if i % 2 else "neg") for i in range(200)])
    labelled, made = loaded(path, labels=True)["train"], loaded(path, template=template, words=WORDS)["train"]
    assert labelled.fraction.tolist() == made.fraction.tolist()
    assert labelled.digest != made.digest  # caches of tokens are by the texts that are tokenized


def test_texts_of_held_out_files_are_not_trained_on_under_another_label(reviews):
    path = reviews([("The same.", "pos"), ("Another one.", "neg")])
    held = reviews([("The same.", "neg")], "test.csv")
    found = loaded(path, template=TEMPLATE, words=WORDS, test_path=held)
    assert list(found["train"].texts()) == ["Another one."] and found.duplicates == 1


def test_without_a_mapped_text_nothing_decides_the_split(reviews):
    data = DataConfig(source="csv", path=reviews([("a", "pos")]), template={"prompt": "{{ row.review }}"})
    with pytest.raises(RequestError, match="needs a text column whose text decides"):
        splits.load(data)


def test_numbers_find_their_words(reviews):
    path = reviews([("a", "1.0"), ("b", "0")])
    found = loaded(path, template=TEMPLATE, words={"1": "good", "0": "bad"})["train"]
    assert list(found.texts("completion")) == [" good", " bad"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": {"prompt": "{{ text }"}}, "data.template.prompt: no valid template"),
        ({"template": {"prompt": "{{ review }}"}}, "x.csv:2: data.template.prompt fails: 'review' is undefined"),
        (
            {"template": TEMPLATE, "words": {"neg": "bad"}},
            "template.completion fails: 'dict object' has no",
        ),
        ({"template": {"prompt": "{{ 'a' * 10**10 }}"}}, "the template makes a value of more than 20,000,000"),
        ({"template": {"prompt": "{{ text.__class__ }}"}}, "data.template.prompt fails: access to attribute"),
    ],
)
def test_what_fails_is_one_line(reviews, settings, message):
    with pytest.raises(RequestError) as e:
        loaded(reviews([("Loved it.", "pos")]), **settings)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("empty", ["", "-1"])
def test_rows_without_a_label_are_dropped_if_asked(reviews, empty, labels):
    path = reviews([("Loved it.", "1"), ("No idea.", empty), ("Bad.", "0")])
    template = {"completion": " {{ label }}"}
    if empty == "":
        with pytest.raises(RequestError, match=r"x.csv:3: the label is empty"):
            loaded(path, labels, template=template)
    found = loaded(path, labels, template=template, words={"1": "good", "0": "bad"}, unlabeled="drop")
    assert found.unlabeled == 1 and list(found["train"].texts("completion")) == [" 1", " 0"]


def test_only_text_columns_are_made():
    with pytest.raises(ValueError, match="makes no column 'label'"):
        DataConfig(template={"label": "x"})


def test_lm_reads_completions_that_templates_make():
    cfg = DataConfig(source="jsonl", path="x.jsonl", template=TEMPLATE, words=WORDS)
    assert {"prompt", "completion"} <= set(SyntheticText(cfg, TASKS["lm"].columns, 16).columns)
