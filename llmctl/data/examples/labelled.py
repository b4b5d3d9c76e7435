"""Build rows of labeled examples: one example per row, padded to T tokens.

Shapes: B rows, T tokens per row, N examples.
"""

from __future__ import annotations

import copy

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.config import Truncate
from llmctl.data.corpus import Corpus, tokenize
from llmctl.data.pretraining.packing import Batch
from llmctl.data.shuffle import Balanced, Epochs
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import TextTemplate, Tokenizer


class ExampleRows:
    """Define the base class of rows that contain one example each. `rows[i]` exists for any i >= 0, because there is no
    last epoch.

    A subclass defines `_build`, which returns the batch for an array of example indices [B].

    Args:
        count: Number of examples, which is the number of rows per epoch.
        seed: Seed of the shuffle.
        shuffle: Whether to shuffle in every epoch; otherwise rows are in the order of the examples.
    """

    def __init__(self, count: int, seed: int, shuffle: bool):
        self._count = count
        self._epochs: Epochs | Balanced = Epochs(count, seed, shuffle)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `rows_B` (any >= 0) as arrays [B, ...]: the stacked rows `self[i]`."""
        return self._build(self.examples(rows_B))

    def examples(self, rows_B: np.ndarray) -> np.ndarray:
        """Return the index of the example that each row contains, int64 [B]."""
        return self._epochs(rows_B)

    def _build(self, example_B: np.ndarray) -> Batch:
        raise NotImplementedError


class ClassificationRows(ExampleRows):
    """Build rows of texts with labels.

    A batch has the arrays `tokens`, `segments` (1 at tokens, 0 at padding) and `positions`, int32 [B, T] each. The
    array `label` has a class int32 [B], a number float32 [B], or a set of classes uint8 [B, C].

    A row is the text with the tokenizer's special tokens around it, followed by padding. By default, `eos` comes after
    the text. If the tokenizer adds `bos`, `bos` comes before the text. If the text is too long, `tail` removes its end
    and keeps its beginning. `head_tail` removes its middle, and keeps its beginning and its end. The special tokens are
    never removed.

    If the data has a column "pair", the row continues with the text of this column and another `eos`. The batch then
    also has `types` [B, T], which is 1 for this second part. If both texts together are too long, the longer text is
    truncated first. Then both texts are truncated equally.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        truncate: Truncate = "tail",
        seed: int = 0,
        shuffle: bool = True,
        corpus: Corpus | None = None,
    ):
        """Tokenize the texts, if `corpus` is not given.

        Args:
            examples: Labeled examples.
            tokenizer: Tokenizer of the model.
            seq_len: Number of tokens per row, T.
            truncate: Part of a long text to remove: the end ("tail") or the middle ("head_tail").
            seed: Seed of the shuffle.
            shuffle: Whether to shuffle in every epoch.
            corpus: Tokenized texts from `corpus.cached`, in the order of `examples`; None tokenizes them.

        Raises:
            RequestError: If the examples have no text or no label.
        """
        if examples.labels is None:
            raise RequestError('the data has no column "label"; map one in data.columns')
        super().__init__(len(examples), seed, shuffle)
        self.classes = examples.classes
        self._labels_N, self._seed = examples.labels, seed
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._truncate: Truncate = truncate
        self._corpus = tokenize(examples.texts(), tokenizer) if corpus is None else corpus
        if len(self._corpus) != len(examples):
            raise ValueError(f"{len(self._corpus)} tokenized texts for {len(examples)} examples")
        self._pairs = tokenize(examples.texts("pair"), tokenizer) if "pair" in examples.columns else None

    def balanced(self) -> ClassificationRows:
        """Return rows of the same examples, sampled so that every class occurs equally often."""
        found = copy.copy(self)
        found._epochs = Balanced(self._labels_N, self._seed)
        return found

    def _build(self, example_B: np.ndarray) -> Batch:
        template, rows = self._tokenizer.template, []
        types_BT = np.zeros((len(example_B), self._seq_len), np.int32)
        for b, example in enumerate(map(int, example_B)):
            pair = None if self._pairs is None else self._pairs[example]
            row, types = templated(template, self._corpus[example], pair, self._seq_len, self._truncate)
            rows.append(row)
            types_BT[b, : len(types)] = types
        batch = padded(rows, self._seq_len, self._tokenizer.pad_id)
        return batch | ({} if self._pairs is None else {"types": types_BT}) | {"label": self._labels_N[example_B]}


def templated(
    template: TextTemplate, text_N: np.ndarray, pair_N: np.ndarray | None, seq_len: int, truncate: Truncate = "tail"
) -> tuple[np.ndarray, np.ndarray]:
    """Add special tokens to a text or a pair of texts, and truncate the texts to fit into `seq_len` tokens.

    Args:
        template: Special tokens around and between the texts.
        text_N: Token ids of the text.
        pair_N: Token ids of the second text, or None.
        seq_len: Maximum number of tokens of the result.
        truncate: Part of a long text to remove: the end ("tail") or the middle ("head_tail").

    Returns:
        Token ids and types, int32 [N] each; types are 1 from the first token of `pair_N` on.
    """
    room = seq_len - len(template.begin) - len(template.end)
    if pair_N is None:
        row = template.row(cut(text_N, room, truncate))
        return row, np.zeros(len(row), np.int32)
    room -= len(template.between)
    kept = min(len(text_N), max(room - len(pair_N), (room + 1) // 2))
    row = template.row(cut(text_N, kept, truncate), cut(pair_N, room - kept, truncate))
    first = len(template.begin) + kept + len(template.between)
    return row, (np.arange(len(row)) >= first).astype(np.int32)


def cut(text_N: np.ndarray, room: int, truncate: Truncate) -> np.ndarray:
    """Truncate a text to at most `room` tokens. `truncate` selects the part to remove: the end ("tail") or the middle
    ("head_tail")."""
    if len(text_N) <= room:
        return text_N
    head = room if truncate == "tail" else room - room // 2
    return np.concatenate([text_N[:head], text_N[len(text_N) - (room - head) :]])


def padded(rows: list[np.ndarray], width: int, pad: int, prefix: str = "") -> Batch:
    """Pad texts on the right, and return the arrays `tokens`, `segments` and `positions`, int32 [B, width].

    `segments` is 1 at tokens and 0 at padding. `positions` has the index of each token in its text.

    Args:
        rows: Token ids of each text.
        width: Number of tokens per row.
        pad: Id of the padding token.
        prefix: Prefix of the array names in the result.
    """
    tokens_BT = np.full((len(rows), width), pad, np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row
        segments_BT[b, : len(row)] = 1
    found = {"tokens": tokens_BT, "segments": segments_BT, "positions": np.arange(width, dtype=np.int32) * segments_BT}
    return {prefix + name: a for name, a in found.items()}
