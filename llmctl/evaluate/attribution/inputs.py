"""Build model inputs for attributions, and find the characters that each token covers.

The inputs of a row are the same as for its prediction. Each row is built twice: with token ids, and with a running
number in place of each id. The numbers show which characters each token covers, even if a part of a long text was
removed.

Shapes: T tokens per row, P scored positions per row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.examples.completions import completion_batch, sequence_batch
from llmctl.data.source import Row
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.tasks.registry import of
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model.config import ModelConfig

TEXT, SPECIAL, CONTINUATION = "text", "special", "continuation"
"""Kinds of tokens. Only tokens of the kind TEXT get an attribution by gradients."""


@dataclass(frozen=True)
class Piece:
    """Describe one token of a row: its characters, and their range [first, last) in a text of the row."""

    text: str
    kind: str
    part: int = 0
    """Index of the text in `Input.texts`."""
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class Input:
    """Store the model inputs of one row, without padding, and a description of its tokens.

    For an encoder-decoder, the described tokens are those of the encoder.
    """

    row: int
    """Index of the row among the rows to explain. A multiple-choice question has one input per choice."""
    arrays: dict[str, np.ndarray]
    """Arrays of the batch by name, [T] each, such as tokens and segments. For a language model, `at`, `targets` and
    `weights`, [P] each, describe the scored positions."""
    pieces: list[Piece]
    texts: list[str]
    """Complete texts, such as premise and hypothesis, of which at least one token is in the row."""

    @property
    def explained(self) -> np.ndarray:
        """Return 1 for tokens that get an attribution by gradients, otherwise 0, int32 [T]."""
        return np.array([piece.kind == TEXT for piece in self.pieces], np.int32)


def side(model: ModelConfig) -> str:
    """Return the prefix of the arrays that hold the described tokens: "encoder_" for encoder-decoders, or ""."""
    return "encoder_" if model.encoder_layers else ""


def of_task(found: Artifact, rows: Sequence[Row], tokenizer: Tokenizer, seq_len: int) -> list[Input]:
    """Return the inputs of rows for a model with a task head, or for a multiple-choice question.

    Raises:
        RequestError: If a row has no text.
    """
    task, model = of(found.manifest), found.model
    settings = RowSettings(seq_len, truncate=found.manifest.truncate or "tail", labels=tuple(found.manifest.labels))
    inputs: list[Input] = []
    for paired in (False, True):
        index = [i for i, row in enumerate(rows) if ("pair" in row) == paired]
        if not index:
            continue
        chosen = [rows[i] for i in index]
        numbered = Numbering(tokenizer)
        made = [task.new_rows(model, chosen, t, settings) for t in (tokenizer, numbered.tokenizer)]
        real, numbers = (r.batch(np.arange(len(r))) for r in made)
        row_N = real.get("question", np.arange(len(chosen)))
        inputs += [
            _input(
                index[int(row)], {k: a[n] for k, a in real.items()}, numbers[f"{side(model)}tokens"][n], side(model),
                numbered,
            )
            for n, row in enumerate(row_N)
        ]  # fmt: skip
    return sorted(inputs, key=lambda one: one.row)


def of_language_model(
    model: ModelConfig,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    seq_len: int,
) -> list[Input]:
    """Return the inputs of prompts whose continuations are scored.

    Args:
        model: Config of a decoder or an encoder-decoder.
        prompts: Texts.
        continuations: Token ids of one continuation per prompt, at least one each.
        tokenizer: Tokenizer of the model.
        seq_len: Maximum number of tokens per row.

    Raises:
        RequestError: If a continuation fills the row, or if a prompt has no token.
    """
    inputs = []
    for row, (prompt, told) in enumerate(zip(prompts, continuations, strict=True)):
        numbered = Numbering(tokenizer)
        ids, numbers = (np.array(t.encode_batch([prompt])[0], np.int64) for t in (tokenizer, numbered.tokenizer))
        if len(told) + len(tokenizer.begin) >= seq_len:
            raise RequestError(f"text {row + 1}: the continuation has {len(told)} tokens, and a row has {seq_len}")
        both = [(ids, np.array(told)), (numbers, np.array(told))]
        if model.encoder_layers:
            batches = [sequence_batch([pair], tokenizer, seq_len, len(told) + 1, False) for pair in both]
        else:
            batches = [completion_batch([pair], tokenizer, seq_len, predict_eos=False) for pair in both]
        real, coded = ({k: a[0] for k, a in b.items()} for b in batches)
        made = _input(row, real, coded[f"{side(model)}tokens"], side(model), numbered)
        if not made.explained.any():
            raise RequestError(f"text {row + 1}: has no token before the continuation; give a longer text")
        inputs.append(made)
    return inputs


def _input(row: int, real: dict[str, Any], numbers_T: np.ndarray, prefix: str, numbered: Numbering) -> Input:
    """Return the input of one row without padding. `numbers_T` has the number of each token (see `Numbering`)."""
    length = int(real[f"{prefix}segments"].sum())
    arrays = {name: a for name, a in real.items() if getattr(a, "ndim", 0) == 1 and name != "label"}
    if "targets" in arrays:
        at_P = np.flatnonzero(arrays["weights"])
        scored = {"at": at_P, **{name: arrays.pop(name)[at_P] for name in ("targets", "weights")}}
        arrays |= {name: a.astype(np.float32 if name == "weights" else np.int32) for name, a in scored.items()}
    # In a decoder, all tokens after the first scored position are tokens of the continuation.
    prompt = int(arrays["at"][0]) + 1 if "at" in arrays and not prefix else length
    pieces, parts = numbered.pieces(numbers_T[:length], real[f"{prefix}tokens"][:length], prompt)
    decoder = int(real["segments"].sum())
    kept = {
        name: a if name in ("at", "targets", "weights") else a[: length if name.startswith(prefix) else decoder]
        for name, a in arrays.items()
    }
    return Input(row, kept, pieces, parts)


class Numbering:
    """Number the tokens of texts, in the order in which a copy of the tokenizer encodes the texts.

    The numbers begin after the largest id of a special token. In rows, these numbers replace the token ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._own = tokenizer
        self._first = max([tokenizer.vocab_size - 1, *tokenizer.prefix]) + 1
        self._texts: list[str] = []
        self._spans: list[tuple[int, int, int]] = []
        """(index of the text, first character, end) of each numbered token."""
        self._names = {i: name for name, i in tokenizer.special_ids.items()}
        self.tokenizer: Any = copy.copy(tokenizer)
        """Copy of the tokenizer, whose `encode_batch` returns numbers."""
        self.tokenizer.encode_batch = self._encode_batch
        self.tokenizer.vocab_size = 2**31  # corpora of larger vocabularies store 32 bits per token

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        out = []
        for text, (_, spans) in zip(texts, self._own.offsets(texts), strict=True):
            begin = self._first + len(self._spans)
            out.append([*range(begin, begin + len(spans))])
            self._spans += [(len(self._texts), first, last) for first, last in spans]
            self._texts.append(text)
        return out

    def pieces(self, numbers_T: np.ndarray, tokens_T: np.ndarray, prompt: int) -> tuple[list[Piece], list[str]]:
        """Return a description of each token of a row, and the texts of the row.

        Args:
            numbers_T: Numbers of the tokens. Special tokens have their ids.
            tokens_T: Ids of the tokens.
            prompt: Number of tokens before the continuation of a language model; without one, the number of all tokens.
        """
        parts: dict[int, int] = {}
        found = []
        for i, (number, token) in enumerate(zip(map(int, numbers_T), map(int, tokens_T), strict=True)):
            if i >= prompt:
                found.append(Piece(self._own.decode([token]), CONTINUATION))
            elif number < self._first:
                found.append(Piece(self._names.get(token, "[prompt]" if token in self._own.prefix else ""), SPECIAL))
            else:
                text, first, last = self._spans[number - self._first]
                part = parts.setdefault(text, len(parts))
                found.append(Piece(self._texts[text][first:last], TEXT, part, first, last))
        return found, [self._texts[text] for text in parts]
