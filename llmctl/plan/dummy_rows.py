"""Rows of a stage without its data: made-up texts through the stage's own objectives, for their shapes and types."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmctl.data.config import DataConfig
from llmctl.data.corpus import tokenize
from llmctl.data.examples.task_rows import task_rows
from llmctl.data.pretraining.objective_rows import Objective
from llmctl.data.sources.base import Table
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.model.config import ModelConfig

TOKENIZER = ByteTokenizer.new(sentinels=1000)
"""Stands for the stage's: no array of a row depends on which tokens there are."""
TEXT = "Once there was a text. It had some sentences! "
COPIES = 4
SHOWN = {"tokens": ("tokens", "tags"), "span": ("context", "question"), "embed": ("pair",)}
"""Columns that a head reads, whatever the data maps."""
LISTS: dict[str, Any] = {"tokens": TEXT.split(), "tags": ["no"] * len(TEXT.split()), "answers": []}
LABELS = {"regress": np.float32, "embed": np.float32}
"""Heads whose labels are numbers."""


def of_text(objective: Objective, seq_len: int, packing: Any = "segments") -> Any:
    """What `objective` makes of documents."""
    documents = tokenize([TEXT * (1 + seq_len // len(TEXT))] * COPIES, TOKENIZER)
    return objective.rows(documents, TOKENIZER, seq_len, seed=0, packing=packing, shuffle=False)


def of_examples(model: ModelConfig, data: DataConfig, seq_len: int) -> Any:
    """What the head of `model` reads of examples that have the columns which `data` maps, and text."""
    asked = [*(c for c in data.columns if c != "label"), *SHOWN.get(model.head, ()), "text"]
    columns = tuple(dict.fromkeys(asked))
    scored = model.head == "embed" and data.label_type == "number"
    row = tuple(LISTS.get(c, TEXT) for c in columns)
    return task_rows(
        model,
        Examples(
            source=Table("made up", columns, [row] * COPIES, range(COPIES)),
            columns=columns,
            index=np.arange(COPIES),
            fraction=np.linspace(0, 1, COPIES, endpoint=False),
            digests=np.zeros((COPIES, 16), np.uint8),
            chars=np.full(COPIES, len(TEXT)),
            labels=None if model.head == "embed" and not scored else np.zeros(COPIES, LABELS.get(model.head, np.int32)),
            part=np.zeros(COPIES, np.int32),
            classes=() if model.head in LABELS else ("no", "yes"),
        ),
        TOKENIZER,
        seq_len,
        shuffle=False,
    )
