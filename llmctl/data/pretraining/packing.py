"""Packing: documents of all lengths into rows of T tokens, without attention or loss across documents.

An epoch is laid out as a line of pieces (whole documents, or parts of them), each starting at a known place of it;
row r is the stretch [r * T, (r + 1) * T). Building a row is a binary search and a gather, whatever the size of the
corpus, and depends on nothing but (corpus, settings, row number): that makes resuming and any number of hosts exact.

Legend: P pieces, B rows, T tokens a row, D documents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.config import Packing
from llmctl.data.corpus import Documents
from llmctl.data.pretraining.objectives import Batch, Packed, causal
from llmctl.data.shuffle import permutation
from llmctl.data.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Layout:
    """P pieces of documents on a line (arrays [P]); what no piece covers is padding."""

    start: np.ndarray
    """Place on the line, ascending."""
    doc: np.ndarray
    first: np.ndarray
    """Offset of the piece in its document."""
    length: np.ndarray


class PackedRows:
    """Endless rows of language-model tokens: `rows[i]` for any i >= 0; `len(rows)` of them are an epoch.

    packing:
        segments: an epoch's documents, shuffled, form one stream that is cut every T tokens; a document cut by the end
            of a row goes on in the next one as a new segment. The stream's last, incomplete row is dropped.
        concat: the same stream, each row one segment: attention and loss cross documents.
        fit: documents (cut at T tokens) are put whole into the row they fit best (best fit, longest first);
            rows are padded, and shuffled each epoch.

    A document is `bos` (where the tokenizer adds it), its tokens, `eos`. With `shuffle=False` documents stay in order
    and the last row is padded instead of dropped: validation sees every token exactly once.
    """

    def __init__(
        self,
        corpus: Documents,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        packing: Packing = "segments",
        shuffle: bool = True,
        objective: Callable[[Packed], Batch] = causal,
    ):
        """Raises RequestError if the corpus does not fill one row."""
        self.seq_len, self.packing, self.shuffle = seq_len, packing, shuffle
        self._corpus, self._tokenizer, self._seed, self._objective = corpus, tokenizer, seed, objective
        self._length_D = corpus.lengths + tokenizer.add_bos + 1
        self.tokens = int(self._length_D.sum())
        """Tokens an epoch, begin and end of sequence included."""
        self._fixed: Layout | None = None
        if packing == "fit":
            self._fixed, self._rows = best_fit(self._length_D, seq_len)
        else:
            self._rows = self.tokens // seq_len if shuffle else -(-self.tokens // seq_len)
        if not self._rows:
            raise RequestError(
                f"the corpus has {self.tokens} tokens, too few for one row of {seq_len}: "
                "more text, or a smaller sequence length"
            )
        self._lock = threading.Lock()
        self._epochs: dict[int, tuple[Layout, np.ndarray | None]] = {}

    def __len__(self) -> int:
        return self._rows

    @property
    def waste(self) -> float:
        """Fraction of an epoch's row places that hold padding."""
        placed = min(self.tokens, self._rows * self.seq_len)
        return 1 - placed / (self._rows * self.seq_len)

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Rows `rows_B` (any numbers >= 0) as arrays [B, T]; the same as stacking `self[i]`."""
        return self._objective(self.packed(rows_B))

    def packed(self, rows_B: np.ndarray) -> Packed:
        """Rows `rows_B` before the objective."""
        epoch_B = rows_B // self._rows
        parts = [(epoch_B == e, *self._epoch(int(e))) for e in np.unique(epoch_B)]
        packed = [self._cut(layout, order, rows_B[here]) for here, layout, order in parts]
        if len(packed) == 1:
            return packed[0]
        # a batch that straddles epochs: put each epoch's rows back where they belong
        place_B = np.argsort(np.concatenate([np.flatnonzero(here) for here, _, _ in parts]))
        return Packed(*(np.concatenate([getattr(p, f) for p in packed])[place_B] for f in Packed.__dataclass_fields__))

    def _cut(self, layout: Layout, order: np.ndarray | None, rows_B: np.ndarray) -> Packed:
        in_epoch_B = rows_B % self._rows
        start_B1 = ((in_epoch_B if order is None else order[in_epoch_B]) * self.seq_len)[:, None]
        at_BT = start_B1 + np.arange(self.seq_len)
        piece_BT = np.searchsorted(layout.start, at_BT, "right") - 1
        into_BT = at_BT - layout.start[piece_BT]
        real_BT = into_BT < layout.length[piece_BT]
        doc_BT = layout.doc[piece_BT]
        offset_BT = into_BT + layout.first[piece_BT]
        follows_BT = real_BT & (offset_BT + 1 < self._length_D[doc_BT])
        segments_BT = piece_BT - piece_BT[:, :1] + 1
        positions_BT = at_BT - np.maximum(layout.start[piece_BT], start_B1)
        next_doc_BT, next_offset_BT = doc_BT, offset_BT + 1
        if self.packing == "concat":
            # one segment a row; the token after a document's last one is the first of the next piece on the line
            segments_BT, positions_BT = np.ones_like(piece_BT), at_BT - start_B1
            joins_BT = real_BT & ~follows_BT & (piece_BT + 1 < len(layout.start))
            after_BT = layout.doc[np.minimum(piece_BT + 1, len(layout.start) - 1)]
            next_doc_BT, next_offset_BT = np.where(joins_BT, after_BT, doc_BT), np.where(joins_BT, 0, offset_BT + 1)
            follows_BT = follows_BT | joins_BT
        # both at once: stored documents are read only once
        tokens_BT, next_BT = self._tokens(
            np.stack([doc_BT, next_doc_BT]),
            np.stack([offset_BT, next_offset_BT]),
            np.stack([real_BT, follows_BT]),
        )
        return Packed(
            rows_B,
            tokens_BT,
            next_BT,
            follows_BT,
            np.where(real_BT, segments_BT, 0).astype(np.int32),
            np.where(real_BT, positions_BT, 0).astype(np.int32),
        )

    def _tokens(self, doc: np.ndarray, offset: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Tokens of wrapped documents (bos, text, eos) at `offset` where `where`, padding elsewhere; any one shape."""
        bos = self._tokenizer.add_bos
        out = np.full(doc.shape, self._tokenizer.pad_id, np.int32)
        last = self._length_D[doc] - 1
        out[where & (offset == last)] = self._tokenizer.eos_id
        if bos:
            out[where & (offset == 0)] = self._tokenizer.bos_id
        text = where & (offset >= bos) & (offset < last)
        out[text] = self._corpus.gather(doc[text], offset[text] - bos)
        return out

    def _epoch(self, epoch: int) -> tuple[Layout, np.ndarray | None]:
        """The line of an epoch and, where rows are shuffled instead of documents, the order of its rows."""
        key = epoch if self.shuffle else 0
        with self._lock:  # several reading threads; one of them lays the epoch out
            if key not in self._epochs:
                while len(self._epochs) > 1:  # two: a batch may straddle epochs
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[key] = self._lay_out(key)
            return self._epochs[key]

    def _lay_out(self, epoch: int) -> tuple[Layout, np.ndarray | None]:
        if self._fixed is not None:
            return self._fixed, permutation(self._rows, self._seed, epoch) if self.shuffle else None
        docs = len(self._length_D)
        doc_P = permutation(docs, self._seed, epoch) if self.shuffle else np.arange(docs)
        length_P = self._length_D[doc_P]
        return Layout(np.cumsum(length_P) - length_P, doc_P, np.zeros(docs, np.int64), length_P), None


def best_fit(length_D: np.ndarray, seq_len: int) -> tuple[Layout, int]:
    """Packs documents, cut every `seq_len` tokens, into rows: longest first, each into the fullest row that has room.

    Returns:
        The layout (row r is the line's stretch [r * seq_len, (r + 1) * seq_len)) and the number of rows.
    """
    count_D = -(-length_D // seq_len)
    doc_P = np.repeat(np.arange(len(length_D)), count_D)
    first_P = (np.arange(len(doc_P)) - np.repeat(np.cumsum(count_D) - count_D, count_D)) * seq_len
    length_P = np.minimum(seq_len, length_D[doc_P] - first_P)
    start_P = np.zeros(len(doc_P), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit k is set when some row has room for exactly k tokens more
    rows = 0
    for p in np.argsort(-length_P, kind="stable"):
        length = int(length_P[p])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, rows = seq_len, rows, rows + 1
        start_P[p] = row * seq_len + seq_len - room
        left = room - length
        if left:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    line = np.argsort(start_P)
    return Layout(start_P[line], doc_P[line], first_P[line], length_P[line]), rows
