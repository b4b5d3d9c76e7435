"""Build rows of labeled words. A label is, for example, a part of speech or the type of a named entity.

Shapes: B rows, T tokens per row, N tokens of a text, W words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.corpus import batched
from llmctl.data.examples.labelled import ExampleRows, padded
from llmctl.data.pretraining.packing import Batch
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer


class TagRows(ExampleRows):
    """Build rows of labeled words.

    A batch has the arrays `tokens`, `segments` (1 at tokens, 0 at padding), `positions` and `targets`, int32 [B, T]
    each. It also has `weights`, float32 [B, T]. The words of an example are joined by spaces. The row is this text with
    the tokenizer's special tokens around it, followed by padding. The label of a word is the target at the word's first
    token, with weight 1. All other positions have weight 0. If a row is too long, its end is truncated.
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer, seq_len: int, *, seed: int = 0, shuffle: bool = True):
        """Tokenize the words, and find the first token of each word.

        Raises:
            RequestError: If the examples have no tokens or no tags.
        """
        if missing := [c for c in ("tokens", "tags") if c not in examples.columns]:
            raise RequestError(f'the data has no column "{missing[0]}" (a list a row); map one in data.columns')
        super().__init__(len(examples), seed, shuffle)
        self._seq_len, self._pad = seq_len, tokenizer.pad_id
        self._template = tokenizer.template
        number = {c: k for k, c in enumerate(examples.classes)}
        self._seen: list[np.ndarray] = []
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.words = self.cut = 0
        """`words` is the number of labeled words. `cut` is the number of labeled words that truncation removes from the
        rows."""
        room = seq_len - len(self._template.row([]))
        for some in batched(examples):
            spans = tokenizer.encode_spans([" ".join(row["tokens"]) for row in some])
            for row, (ids_N, spans_N2) in zip(some, spans, strict=True):
                at_W = first_tokens(row["tokens"], spans_N2)
                seen_W = (at_W >= 0) & (at_W < room)
                tags_W = np.array([number[tag] for tag in row["tags"]], np.int32)
                self._rows.append((ids_N[:room], at_W[seen_W] + len(self._template.begin), tags_W[seen_W]))
                self._seen.append(seen_W)
                self.words += len(tags_W)
                self.cut += len(tags_W) - int(seen_W.sum())

    def count_of(self, i: int) -> int:
        """Return the number of words of example i."""
        return len(self._seen[i])

    def seen_of(self, i: int) -> np.ndarray:
        """Return, for each word of example i, whether truncation keeps the word, bool [W]."""
        return self._seen[i]

    def _build(self, example_B: np.ndarray) -> Batch:
        chosen = [self._rows[i] for i in example_B]
        whole = [self._template.row(ids_N) for ids_N, _, _ in chosen]
        batch = padded(whole, self._seq_len, self._pad)
        targets_BT, weights_BT = (np.zeros(batch["tokens"].shape, kind) for kind in (np.int32, np.float32))
        for b, (_, at_W, tags_W) in enumerate(chosen):
            targets_BT[b, at_W], weights_BT[b, at_W] = tags_W, 1
        return batch | {"targets": targets_BT, "weights": weights_BT}


def first_tokens(words: Sequence[str], spans_N2: np.ndarray) -> np.ndarray:
    """Return the index of the first token of each word, int64 [W], for words joined by single spaces.

    The index is -1 if a word is empty or has no token. If two words share a token, the index of the second word is -1.

    Args:
        words: Words of the text.
        spans_N2: Range [first, last) of the characters of each token.
    """
    lengths_W = np.array([len(word) for word in words], np.int64)
    starts_W = np.cumsum(lengths_W + 1) - lengths_W - 1
    # Span ends never decrease, so the first token that ends after a word's start is the first that can overlap it.
    at_W = np.searchsorted(np.maximum.accumulate(spans_N2[:, 1]), starts_W, "right")
    shows_W = np.append(spans_N2[:, 0], np.iinfo(np.int32).max)[at_W] < starts_W + lengths_W
    at_W = np.where(shows_W, at_W, -1)
    own_W = np.zeros(len(at_W), bool)
    own_W[np.unique(at_W, return_index=True)[1]] = True
    return np.where(own_W, at_W, -1)
