"""The rows that a model's head learns from and is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmctl.data import Truncate
from llmctl.data.corpus import tokenize
from llmctl.data.examples import ClassificationRows, CompletionRows
from llmctl.data.language import Text
from llmctl.data.packing import PackedRows
from llmctl.data.splits import Examples
from llmctl.data.tokenizer import Tokenizer
from llmctl.errors import RequestError


def task_rows(
    head: str,
    examples: Examples,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    seed: int = 0,
    shuffle: bool,
    truncate: Truncate = "tail",
) -> Any:
    """Labelled rows for a classifier; for a language model completions where the data has them, else packed text.

    Raises:
        RequestError: the head has no rows of this kind, or the data lacks the columns.
    """
    if head == "classify":
        return ClassificationRows(examples, tokenizer, seq_len, truncate=truncate, seed=seed, shuffle=shuffle)
    if head == "lm" and "completion" in examples.columns:
        return CompletionRows(examples, tokenizer, seq_len, seed=seed, shuffle=shuffle)
    if head == "lm":
        return PackedRows(tokenize(examples.texts(), tokenizer), tokenizer, seq_len, seed=seed, shuffle=shuffle)
    raise RequestError(f"no data rows for a model with head {head!r}")


def stage_rows(
    head: str,
    text: Text,
    split: str,
    tokenizer: Tokenizer,
    seq_len: int,
    cache: Path,
    *,
    seed: int = 0,
    shuffle: bool,
    truncate: Truncate = "tail",
    needed: int = 0,
) -> Any:
    """`task_rows` of a split; plain text for a language model also prepared, or mixed by weight (`Text.rows`).

    Raises:
        RequestError: as `task_rows` and `Text.rows`.
    """
    if head == "lm" and "completion" not in text.columns:
        return text.rows(split, tokenizer, seq_len, cache, seed=seed, shuffle=shuffle, needed=needed)
    return task_rows(head, text.splits[split], tokenizer, seq_len, seed=seed, shuffle=shuffle, truncate=truncate)
