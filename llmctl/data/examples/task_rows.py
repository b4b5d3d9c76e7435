"""The rows that a model's head learns from and is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from llmctl.config.errors import RequestError
from llmctl.data.config import Truncate
from llmctl.data.corpus import tokenize
from llmctl.data.examples.extractive_qa import AnswerRows
from llmctl.data.examples.labelled import ClassificationRows, CompletionRows, SequencePairRows
from llmctl.data.examples.text_pairs import TwoTextRows
from llmctl.data.examples.token_labels import TagRows
from llmctl.data.pretraining import objective_rows
from llmctl.data.pretraining.lm_corpus import Text, check_epochs
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.loading import Tokenizer


class Model(Protocol):
    """What rows depend on (a `llmctl.model.config.ModelConfig`)."""

    @property
    def architecture(self) -> str:
        """Which stacks there are."""
        ...

    @property
    def head(self) -> str:
        """What the model answers with."""
        ...

    @property
    def next_sentence(self) -> bool:
        """Whether it also tells if a passage follows another."""
        ...


COLUMNS = {
    "classify": ("text", "label"),
    "regress": ("text", "label"),
    "tokens": ("tokens", "tags"),
    "span": ("context", "question", "answers"),
    "embed": ("text", "pair"),
    "lm": ("text",),
}
"""Columns that a head's rows must have."""


def task_rows(
    model: Model,
    examples: Examples,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    seed: int = 0,
    shuffle: bool,
    truncate: Truncate = "tail",
) -> Any:
    """What the model's head learns from: labelled texts or words, answers in contexts, pairs of texts.

    A language model has completions where the data has them, else text. An encoder-decoder reads prompts with its
    encoder. Text asks for what the architecture is for: the next token, masks and next sentences, or spans.

    Raises:
        RequestError: the head has no rows of this kind, or the data lacks the columns.
    """
    if model.head in ("classify", "regress"):
        return ClassificationRows(examples, tokenizer, seq_len, truncate=truncate, seed=seed, shuffle=shuffle)
    if model.head == "embed":
        return TwoTextRows(examples, tokenizer, seq_len, truncate=truncate, seed=seed, shuffle=shuffle)
    if model.head in ("tokens", "span"):
        rows = TagRows if model.head == "tokens" else AnswerRows
        return rows(examples, tokenizer, seq_len, seed=seed, shuffle=shuffle)
    if model.head == "lm" and completes(model, examples.columns):
        kind = SequencePairRows if model.architecture == "encoder_decoder" else CompletionRows
        return kind(examples, tokenizer, seq_len, seed=seed, shuffle=shuffle)
    if model.head == "lm":
        documents = tokenize(examples.texts(), tokenizer)
        return objective(model).rows(documents, tokenizer, seq_len, seed=seed, packing="segments", shuffle=shuffle)
    raise RequestError(f"no data rows for a model with head {model.head!r}")


def objective(model: Model) -> objective_rows.Objective:
    """What text asks of a language model."""
    return objective_rows.Objective(objective_rows.default(model.architecture, model.next_sentence))


def completes(model: Model, columns: Iterable[str]) -> bool:
    """Whether a language model is to complete prompts; an encoder cannot."""
    return model.architecture != "encoder" and "completion" in columns


def stage_rows(
    model: Model,
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
    if model.head == "lm" and not completes(model, text.columns):
        return text.rows(
            split, tokenizer, seq_len, cache, seed=seed, shuffle=shuffle, needed=needed, objective=objective(model)
        )
    rows = task_rows(model, text.splits[split], tokenizer, seq_len, seed=seed, shuffle=shuffle, truncate=truncate)
    if text.epochs:
        check_epochs(needed, round(text.epochs * len(rows)))
    return rows
