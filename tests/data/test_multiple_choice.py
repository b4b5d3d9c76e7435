"""Choices and answers in the formats of published sets, and what is refused."""

import pytest

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.data.examples.choices import ChoiceRows
from llmctl.data.multiple_choice import read
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["red", "blue"], 1, 1),
        (["red", "blue"], 1.0, 1),
        (["red", "blue"], "1", 1),
        (["red", "blue"], "B", 1),
        (["red", "blue"], "blue", 1),
        (["B", "A"], "A", 1),  # the text of a choice comes before its letter
        (["4", "3", "2"], "2", 2),  # and before its index
        ({"text": ["x", "y"], "label": ["1", "2"]}, "1", 0),  # names, not indices
        ({"text": ["x", "y"], "label": ["A", "B"]}, "B", 1),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "y", 1),
        ({"text": ["x", "y"], "label": [1, 2]}, 1, 0),
    ],
)
def test_answers_by_index_letter_name_and_text(choices, answer, index):
    texts = tuple(choices["text"] if isinstance(choices, dict) else choices)
    assert read(choices, answer) == (texts, index)


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (["a", "b"], 2, r"the answer 2 is none of the choices \(0 to 1, A to B, or a choice\)"),
        (["a", "b"], -1, "none of the choices"),
        (["a", "b"], True, "none of the choices"),
        (["a", "b"], 0.5, "none of the choices"),
        (["a", "b"], float("nan"), "none of the choices"),
        (["a", "b"], float("inf"), "none of the choices"),
        (["a", "b"], None, "none of the choices"),
        (["a", "b"], "c", "none of the choices"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, 0, r"none of the choices \(A, B\)"),
        ({"text": ["x", "y"], "label": ["A"]}, "A", "one label per text"),
        (["a"], 0, "at least two different choices"),
        (["a", "a"], 0, "at least two different choices"),
        (["a", ""], 0, "must be a list of texts"),
        ("ab", 0, "must be a list of texts"),
        ([1, 2], 0, "must be a list of texts"),
    ],
)
def test_what_is_refused(choices, answer, message):
    with pytest.raises(RequestError, match=message):
        read(choices, answer)


def test_columns_of_that_name_that_are_no_questions_are_left_alone(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("text,label,choices,answer\na,y,x|y,x\nb,n,x|y,z\n")
    found = splits.load(DataConfig(source="csv", path=str(file), validation=0, test=0))
    assert found.classes == ("n", "y")
    data = DataConfig(
        source="csv", path=str(file), columns={"prompt": "text", "choices": "choices", "answer": "answer"}
    )
    examples = splits.load(data.model_copy(update={"validation": 0.0, "test": 0.0}))["train"]
    with pytest.raises(RequestError, match=r"x.csv:2: choices must be a list of texts"):
        ChoiceRows(examples, ByteTokenizer.new(), 16, "decoder")
