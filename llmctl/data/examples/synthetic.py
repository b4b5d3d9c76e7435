"""Generate synthetic examples, to get the shapes and dtypes of training rows without reading the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from llmctl.data import splits
from llmctl.data.config import DataConfig, Split
from llmctl.data.corpus import Documents, tokenize
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.source import Table
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer.new(sentinels=1000)
"""Tokenizer for synthetic examples. The shapes of rows are the same for any model, because they do not depend on the
vocabulary."""
TOKENIZER.chat_template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
TEXT = "Once there was a text. It had some sentences! "
COPIES = 4


class SyntheticText(Text):
    """Generate a few synthetic examples with the columns that a data config maps.

    Example:
        text = SyntheticText(config.data, ("text", "label"), seq_len=128)
        rows = stage_rows(model, text, "train", TOKENIZER, 128, Path(), shuffle=False)
    """

    def __init__(
        self, cfg: DataConfig, columns: Sequence[str] = (), seq_len: int = 0, classes: Sequence[str] = ()
    ) -> None:
        """Generate a few examples.

        Args:
            cfg: Settings of the data. The data itself is not read.
            columns: Columns that the task reads, in addition to the columns that `cfg` maps.
            seq_len: Minimum document length in tokens.
            classes: Class names to use if `cfg` has no class names; two names by default.
        """
        self._cfg, self._examples = cfg, examples(cfg, columns, seq_len, classes)

    @property
    def splits(self) -> splits.Splits:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the splits. Train, validation and test contain the same synthetic examples."""
        held = dict.fromkeys(get_args(Split), self._examples)
        return splits.Splits(DataConfig(), held, rows=COPIES, filtered=0, blank=0, duplicates=0)

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names of the synthetic labels."""
        return self._examples.classes

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the synthetic examples' columns, such as text and label."""
        return self._examples.columns

    @property
    def epochs(self) -> float:
        """Return the maximum number of epochs: 0, which means no limit."""
        return 0.0

    def documents(self, split: str, tokenizer: Tokenizer, cache: Path) -> list[tuple[float, float, Documents]]:
        """Return the tokenized texts as one source with weight 1 and unlimited epochs."""
        return [(1.0, 0.0, tokenize(self._examples.texts(), tokenizer))]


def examples(cfg: DataConfig, columns: Sequence[str], seq_len: int, classes: Sequence[str] = ()) -> Examples:
    """Generate synthetic examples with the given columns. `SyntheticText` describes the arguments."""
    made = [c for part in cfg.parts() for c in part.template]
    asked = [*(c for c in cfg.columns if c != "label"), *made, *(c for c in columns if c != "label"), "text"]
    names = tuple(dict.fromkeys(asked))
    numbers, sets = cfg.label_type == "number", cfg.label_type == "set"
    labelled = numbers or "label" in columns
    found = tuple(cfg.classes) or tuple(classes) or ("no", "yes")
    long, words = TEXT * (1 + seq_len // len(TEXT)), TEXT.split()
    values: dict[str, Any] = {
        "tokens": words,
        "tags": found[:1] * len(words),
        "answers": [],
        "question": TEXT,
        "choices": tuple(next((part.words.values() for part in cfg.parts() if len(part.words) > 1), words[:4])),
        "answer": 0,
    }
    values |= {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": long}], "tools": None}
    row = tuple(values.get(name, long) for name in names)
    labels = np.zeros(COPIES, np.float32 if numbers else np.int32)
    labels = np.zeros((COPIES, len(found)), np.uint8) if sets else labels
    return Examples(
        source=Table("made up", names, [row] * COPIES, range(COPIES)),
        columns=names,
        index=np.arange(COPIES),
        fraction=np.linspace(0, 1, COPIES, endpoint=False),
        digests=np.zeros((COPIES, 16), np.uint8),
        chars=np.full(COPIES, len(long)),
        labels=labels if labelled else None,
        part=np.zeros(COPIES, np.int32),
        classes=found if not numbers and (labelled or "tags" in columns) else (),
    )
