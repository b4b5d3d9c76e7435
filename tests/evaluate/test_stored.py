"""Results of earlier evaluations: a result is kept only if everything that can change its numbers is the same."""

import json
from types import SimpleNamespace

import pytest

from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.evaluate import stored
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Held, Setup
from llmctl.evaluate.stored import Scored, Stored
from llmctl.evaluate.tasks.registry import TASKS


def test_times_of_another_measurement_are_not_kept():
    timing = {"timed_on": "1 x cpu", "timed_batch": 32, "timed_rounds": 15}
    result = {"content": "", "digest": "a", "definition": "b", **timing}
    before = Stored([Scored(result)])
    assert before.find("a", "b") and before.find("a", "b", timing)
    for name, value in (("timed_on", "8 x cpu"), ("timed_batch", 8), ("timed_rounds", 1)):
        assert before.find("a", "b", timing | {name: value}) is None
    del result["timed_on"]
    assert before.find("a", "b") and before.find("a", "b", timing) is None


ROWS = {
    "choice": [{"prompt": p, "choices": ["a", "b"], "answer": 0} for p in ("one", "two")],
    "tokens": [{"tokens": ["one", "two"], "tags": ["O", "B-X"]}, {"tokens": ["three"], "tags": ["O"]}],
    "span": [{"context": "one two", "question": "q", "answers": {"text": ["two"], "answer_start": [4]}}],
}
CORRECTED = {
    "choice": {"answer": 1},
    "tokens": {"tags": ["B-X", "O"]},
    "span": {"answers": {"text": ["one"], "answer_start": [0]}},
}


@pytest.mark.parametrize("task", ROWS)
def test_corrected_labels_of_the_same_texts_are_another_definition(task, tmp_path):
    """The texts do not change."""
    setup = Setup(SimpleNamespace(), 32, 32, 4, "tail", "float32")  # pyright: ignore[reportArgumentType]
    rows, found = ROWS[task], []
    for changed in (rows, rows, [rows[0] | CORRECTED[task], *rows[1:]]):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
        data = DataConfig(source="jsonl", path=str(file), test=1.0, validation=0.0)
        examples = splits.load(data)["test"]
        assert len(examples) == len(rows)
        found.append(stored.definition(MeasureConfig(), TASKS[task], Held(examples, "test", tmp_path), setup))
    assert found[0] == found[1] != found[2]


def test_two_tasks_of_one_name_are_refused():
    """Results and records are stored by the name of the task."""
    assert MeasureConfig(tasks=["a/one.toml", "b/two.toml", "lm"]).named_tasks == ["lm"]
    for tasks in (["a/one.toml", "b/one.toml"], ["lm", "lm.toml"]):
        with pytest.raises(ValueError, match="two tasks are named"):
            MeasureConfig(tasks=tasks)


def test_texts_with_other_line_ends_are_read_back(tmp_path):
    """U+2028, U+0085 and form feeds end a line for str.splitlines; such records were lost without a word."""
    result = {"artifact": "a", "record": "t", "content": "", "digest": "d", "definition": "e"}
    records = [{"artifact": "a", "task": "t", "text": "one\u2028two\u0085three\x0cfour"}]
    stored.write([Scored(result, records)], tmp_path)
    with (tmp_path / stored.RECORDS).open("a") as stream:
        stream.write('{"artifact": "a", "ta')  # a killed process leaves an incomplete line
    found = stored.read(tmp_path, tmp_path / "none").find("d", "e")
    assert found is not None and found.records == records
