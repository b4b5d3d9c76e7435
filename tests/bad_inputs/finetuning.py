"""Rows from which a task cannot learn: labels of the wrong type, one class only, empty texts, answers elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from bad_inputs.case import Case, put

SHARED = ["--data.validation", "0.5", "--data.test", "0", "--train.steps", "1", "--train.seq-len", "8"]


def rows() -> Iterator[Case]:
    answer = {"text": ["zzz"], "answer_start": [0]}
    user, said = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    templates = ["--data.template", '{prompt="{{ text }}",completion="{{ nothing }}"}']
    tables: dict[str, tuple[str, str, list[dict[str, Any]], list[str]]] = {
        "one class": ("classifier", "classify", [{"text": f"t{i}", "label": "a"} for i in range(9)], []),
        "one class of two": (
            *("classifier", "classify", [{"text": f"t{i}", "label": "a"} for i in range(9)]),
            ["--data.classes", "a,b"],
        ),
        "a label that is not listed": (
            *("classifier", "classify", [{"text": "t", "label": "z"}]),
            ["--data.classes", "a,b"],
        ),
        "a label is a list": ("classifier", "classify", [{"text": "t", "label": ["a"]}], []),
        "a set is a text": ("classifier", "multilabel", [{"text": "t", "label": "a"}], ["--data.label-type", "set"]),
        "a number is a text": ("classifier", "regress", [{"text": "t", "label": "x"}], ["--data.label-type", "number"]),
        "tags of other words": ("classifier", "tokens", [{"tokens": ["a", "b"], "tags": ["x"]}], []),
        "an answer elsewhere": ("classifier", "span", [{"context": "ab", "question": "q", "answers": answer}], []),
        "an empty second text": ("art", "embed", [{"text": "t", "pair": " "}], []),
        "an empty completion": ("art", "lm", [{"prompt": "p", "completion": " "}], []),
        "no completion": ("art", "seq2seq", [{"prompt": "p"}], []),
        "no assistant": ("art", "chat", [{"messages": [user]}], ["--chat.template", "chatml"]),
        "an unknown role": (
            *("art", "chat", [{"messages": [{**user, "role": "x"}, said]}]),
            ["--chat.template", "chatml"],
        ),
        "an answer that is no choice": ("art", "choice", [{"prompt": "p", "choices": ["x", "y"], "answer": 5}], []),
        "equal choices": ("art", "choice", [{"prompt": "p", "choices": ["x", "x"], "answer": 0}], []),
        "no rejected": ("art", "preference", [{"prompt": "p", "chosen": "x"}], ["--method", "lora"]),
        "a chosen conversation": (
            *("art", "preference", [{"prompt": "p", "chosen": [said], "rejected": "y"}]),
            ["--method", "lora"],
        ),
        "a template that fails": ("art", "lm", [{"text": "t", "label": "a"}], templates),
    }  # fmt: skip
    for name, (base, task, table, more) in tables.items():
        lines = "\n".join(map(json.dumps, table * 2 if len(table) == 1 else table))
        data = ["--data.source", "jsonl", "--data.path", "IN/x.jsonl", "--no-data.dedup"]
        argv = ["finetune", "--from", f"IN/{base}", "--out", "OUT", "--task", task, *data, *SHARED, *more]
        yield Case(f"finetune {task}: {name}", argv, (base,), put("x.jsonl", lines))
