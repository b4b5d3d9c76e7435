"""Build rows for extractive question answering from data in SQuAD's format (Rajpurkar et al., 2016, arXiv:1606.05250).

Shapes: B rows, T tokens per row, N tokens of a context.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.corpus import batched
from llmctl.data.examples.labelled import ExampleRows, padded
from llmctl.data.pretraining.packing import Batch
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer


class Window(NamedTuple):
    """Describe one row: a question, and the tokens `first` to `last` - 1 of a context, which form one window.

    `start` and `end` are the positions of the answer's first and last token in the row. Both are 0 if the window does
    not contain the answer.
    """

    example: int
    first: int
    last: int
    start: int
    end: int


class AnswerRows(ExampleRows):
    """Build rows for extractive question answering. Each row has a question and one window of its context.

    A row is the question and the context, with the tokenizer's special tokens around and between them. A long context
    is split into windows that overlap by half. A question longer than half a row is truncated. A batch has these int32
    arrays:
    - `tokens`, `segments` (1 at tokens, 0 at padding), `positions` [B, T]
    - `types` [B, T]: 0 for tokens before the context, 1 from the context on
    - `among` [B, T]: 1 for tokens at which an answer may begin or end. These are the tokens of the context and, for "no
      answer", the first token of the row.
    - `first`, `last` [B, T]: range [first, last) of the context's characters that each token covers
    - `start`, `end` [B]: positions of the first and the last token of the first accepted answer. Both are 0 if there is
      no answer. Both are also 0 if the window does not contain the complete answer.
    - `example` [B]: index of the example to which the row belongs
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer, seq_len: int, *, seed: int = 0, shuffle: bool = True):
        """Tokenize the examples and split contexts into windows.

        Raises:
            RequestError: If the examples have no question or no context, or if `seq_len` is too small for question and
                context.
        """
        if missing := [c for c in ("question", "context") if c not in examples.columns]:
            raise RequestError(f'the data has no column "{missing[0]}"; map one in data.columns')
        self._seq_len, self._tokenizer = seq_len, tokenizer
        self._template = tokenizer.template
        room = seq_len - len(self._template.row([], []))
        if room < 4:
            raise RequestError(f"seq_len: {seq_len} tokens are too few for a question and its context")
        self._questions: list[np.ndarray] = []
        self._contexts: list[tuple[np.ndarray, np.ndarray]] = []
        self._windows: list[Window] = []
        for some in batched(examples):
            asked = tokenizer.encode_batch([row["question"] for row in some])
            spans = tokenizer.encode_spans([row["context"] for row in some])
            for row, question, context in zip(some, asked, spans, strict=True):
                self._questions.append(np.array(question[: room // 2], np.int32))
                self._contexts.append(context)
                self._windows += self._cut(room, next(iter(row.get("answers") or ()), None))
        super().__init__(len(self._windows), seed, shuffle)

    def _cut(self, room: int, answer: tuple[str, int] | None) -> list[Window]:
        """Split the context of the most recently added example into overlapping windows.

        Args:
            room: Number of tokens per row for the question and the context together.
            answer: First accepted answer as (text, index of its first character); None if there is no answer.
        """
        example, spans_N2 = len(self._questions) - 1, self._contexts[-1][1]
        begin = len(self._template.begin) + len(self._questions[-1]) + len(self._template.between)
        width = room - len(self._questions[-1])
        found = token_span(spans_N2, answer[1], answer[1] + len(answer[0])) if answer else None
        out, first = [], 0
        while True:
            last = min(first + width, len(spans_N2))
            inside = found is not None and first <= found[0] and found[1] < last
            start, end = (found[0] - first + begin, found[1] - first + begin) if found and inside else (0, 0)
            out.append(Window(example, first, last, start, end))
            if last == len(spans_N2):
                return out
            first += width - width // 2

    def _build(self, example_B: np.ndarray) -> Batch:
        windows = [self._windows[i] for i in example_B]
        rows, shape = [], (len(windows), self._seq_len)
        batch = {name: np.zeros(shape, np.int32) for name in ("types", "among", "first", "last")}
        batch["among"][:, 0] = 1
        for b, w in enumerate(windows):
            ids_N, spans_N2 = self._contexts[w.example]
            question_N = self._questions[w.example]
            rows.append(self._template.row(question_N, ids_N[w.first : w.last]))
            begin = len(self._template.begin) + len(question_N) + len(self._template.between)
            here = slice(begin, begin + w.last - w.first)
            batch["types"][b, begin : len(rows[-1])] = 1
            batch["first"][b, here], batch["last"][b, here] = spans_N2[w.first : w.last].T
            batch["among"][b, here] = spans_N2[w.first : w.last, 1] > spans_N2[w.first : w.last, 0]
        batch |= padded(rows, self._seq_len, self._tokenizer.pad_id)
        numbers = np.array([(w.start, w.end, w.example) for w in windows], np.int32).reshape(-1, 3)
        return batch | {name: numbers[:, k] for k, name in enumerate(("start", "end", "example"))}


def token_span(spans_N2: np.ndarray, first: int, last: int) -> tuple[int, int] | None:
    """Return the indices of the first and the last token that overlap the characters `first` to `last` - 1.

    Return None if no token overlaps these characters.

    Args:
        spans_N2: Character range [first, last) of each token.
        first: Index of the first character.
        last: Index after the last character.
    """
    shows_N = (spans_N2[:, 0] < last) & (spans_N2[:, 1] > first) & (spans_N2[:, 1] > spans_N2[:, 0])
    at = np.flatnonzero(shows_N)
    return (int(at[0]), int(at[-1])) if len(at) else None
