"""Compare rows of made-up text with rows of data: the same arrays, shapes and types for every task."""

import json
from pathlib import Path

import pytest

from llmctl.data.config import DataConfig
from llmctl.data.examples import synthetic
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model.config import ModelConfig

SEQ_LEN = 32
WORDS = ["One", "more", "text", "that", "is", "long", "enough", "for", "a", "row", "of", "this", "length."]
ROWS = {
    "classify": {"text": "", "label": "x"},
    "pair": {"text": "", "pair": "two", "label": "x"},
    "multilabel": {"text": "", "label": ["x"]},
    "regress": {"text": "", "label": 0.5},
    "tokens": {"tokens": WORDS, "tags": ["O"] * len(WORDS)},
    "span": {"context": "", "question": "How many?", "answers": {"text": ["One"], "answer_start": [0]}},
    "embed": {"text": "", "pair": "two"},
    "scored": {"text": "", "pair": "two", "label": 0.5},
    "completion": {"prompt": "", "completion": "two"},
    "lm": {"text": ""},
    "seq2seq": {"prompt": "", "completion": "two"},
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}
TYPES = {float: "number", list: "set"}
HEADS = {"pair": "classify", "scored": "embed", "completion": "lm"}


@pytest.mark.parametrize("name", ROWS)
def test_rows_have_the_form_of_the_data(name, tmp_path):
    columns, head = ROWS[name], HEADS.get(name, name)
    lines = [{c: v or f"{' '.join(WORDS)} {i}" for c, v in columns.items()} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cfg = DataConfig(
        source="jsonl",
        path=str(tmp_path / "x.jsonl"),
        columns={c: c for c in columns},
        label_type=TYPES.get(type(columns.get("label")), "class"),
        classes=["no", "x"] if isinstance(columns.get("label"), list) else [],
        validation=0,
        test=0,
        dedup=False,
    )
    model = ModelConfig(head="lm").model_copy(update={"head": TASKS[head].head})

    def forms(text, cache):
        rows = TASKS[head].stage_rows(model, text, "train", synthetic.TOKENIZER, cache, RowSettings(SEQ_LEN))
        return {key: (a.shape, a.dtype) for key, a in rows[0].items()}

    made = synthetic.SyntheticText(cfg, TASKS[head].columns, SEQ_LEN)
    told = Text(cfg, conversations=TASKS[head].reads_conversations)
    assert forms(made, Path("no such folder")) == forms(told, tmp_path)


def test_classes_are_those_of_the_data_then_of_the_parent():
    plain, told = DataConfig(), DataConfig(classes=["a", "b", "c"])
    assert synthetic.SyntheticText(plain, ("text", "label")).classes == ("no", "yes")
    assert synthetic.SyntheticText(plain, ("text", "label"), classes=["x", "y"]).classes == ("x", "y")
    assert synthetic.SyntheticText(told, ("tokens", "tags"), classes=["x", "y"]).classes == ("a", "b", "c")
    assert synthetic.SyntheticText(told, ("text", "pair")).classes == ()
