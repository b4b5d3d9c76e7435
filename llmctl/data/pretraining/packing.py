"""Pack documents of any length into rows of T tokens, without attention or loss across documents.

For each epoch, documents are divided into pieces (whole documents or parts of documents). The pieces are placed one
after the other into one long sequence of tokens, the epoch's token sequence. Row r consists of T tokens of this
sequence, from token r * T on. Only the offset of each piece in the sequence is stored, not the sequence itself. A
binary search finds the pieces of a row. The time per row therefore hardly depends on the size of the corpus.

A row depends only on the corpus, the settings and the row number. A row is therefore the same after a resume and for
any number of hosts.

Shapes: P pieces, B rows, T tokens per row, D documents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.config import Packing
from llmctl.data.corpus import Documents
from llmctl.data.shuffle import permutation
from llmctl.data.tokenizers.base import Tokenizer

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Packed:
    """Store rows [B, T] of packed documents, before an objective builds inputs and targets."""

    rows: np.ndarray
    """Row numbers, int64 [B]. Random choices of an objective depend only on the row numbers and the seed."""
    tokens: np.ndarray
    """Token ids, int32 [B, T]. At padding, the value is the id of the padding token."""
    next: np.ndarray
    """Next token, int32 [B, T]. It may be in the next row. If the packing is `concat`, it may belong to the next
    document. Otherwise, the value after the last token of a document is the id of the padding token."""
    follows: np.ndarray
    """Whether `next` has a token, bool [B, T]. Otherwise `next` has the id of the padding token."""
    segments: np.ndarray
    """Segment ids, int32 [B, T]: 0 for padding, and 1, 2, … for the documents of a row."""
    positions: np.ndarray
    """Index of each token in its segment, int32 [B, T]."""


def causal(packed: Packed) -> Batch:
    """Build inputs and targets of causal language modeling: each token predicts the next token of its document.

    Each token of a document except its first is predicted once.
    """
    return {
        "tokens": packed.tokens,
        "targets": packed.next,
        "weights": packed.follows.astype(np.float32),
        "segments": packed.segments,
        "positions": packed.positions,
    }


@dataclass(frozen=True)
class Layout:
    """Store the position of each piece of a document in the token sequence of one epoch.

    A piece is a document or a part of a document. The epoch's token sequence is divided into rows of T tokens. Tokens
    of the sequence that belong to no piece are padding. Each array has one entry per piece, int64 [P].
    """

    start: np.ndarray
    """Index of the piece's first token in the epoch's token sequence. The indices are ascending."""
    doc: np.ndarray
    first: np.ndarray
    """Index of the piece's first token in its document."""
    length: np.ndarray


class PackedRows:
    """Build endless rows of packed documents: `rows[i]` exists for any i >= 0, and `len(rows)` is one epoch.

    A document is its tokens, followed by `eos`. If the tokenizer adds `bos`, the document begins with `bos`. With
    `shuffle=False`, documents stay in order, and the last row is padded, not dropped. Validation then reads every token
    exactly once.

    Packing methods:
    - segments: the shuffled documents of an epoch are concatenated, and the result is split every T tokens. Each
      document in a row has its own segment id, and attention stays within this document. If the end of a row splits a
      document, the document continues in the next row as a new segment. The last, incomplete row is dropped.
    - concat: rows are split as for `segments`, but a whole row has one segment id. Attention and loss therefore extend
      across documents.
    - fit: documents are split into pieces of at most T tokens. From the longest to the shortest, each piece is placed
      into the fullest row that has enough space (best fit). Rows are padded, and shuffled in each epoch.

    Args:
        corpus: Tokenized documents.
        tokenizer: Tokenizer of the model.
        seq_len: Number of tokens per row, T.
        seed: Seed of the shuffle.
        packing: Packing method.
        shuffle: Whether to shuffle in every epoch.
        objective: Function that builds a batch from packed rows, such as `causal`.

    Raises:
        RequestError: If the corpus has fewer tokens than one row.
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
        self.seq_len, self.packing, self.shuffle = seq_len, packing, shuffle
        self._corpus, self._tokenizer, self._seed, self._objective = corpus, tokenizer, seed, objective
        self._length_D = corpus.lengths + tokenizer.add_bos + 1
        self._start_D = np.cumsum(corpus.lengths) - corpus.lengths
        self.tokens = int(self._length_D.sum())
        """Number of tokens per epoch, including beginning-of-sequence and end-of-sequence tokens."""
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
        """Return the fraction of padding among the positions of an epoch."""
        placed = min(self.tokens, self._rows * self.seq_len)
        return 1 - placed / (self._rows * self.seq_len)

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `rows_B` (any >= 0) as arrays [B, T]: the stacked rows `self[i]`."""
        return self._objective(self.packed(rows_B))

    def packed(self, rows_B: np.ndarray) -> Packed:
        """Return the rows with the numbers `rows_B` (any >= 0) before the objective is applied."""
        epoch_B = rows_B // self._rows
        parts = [(epoch_B == e, *self._epoch(int(e))) for e in np.unique(epoch_B)]
        packed = [self._cut(layout, order, rows_B[here]) for here, layout, order in parts]
        if len(packed) == 1:
            return packed[0]
        # A batch may contain rows of several epochs: restore the order of its rows.
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
            # Each row is one segment. A document's last token is followed by the first token of the next piece.
            segments_BT, positions_BT = np.ones_like(piece_BT), at_BT - start_B1
            joins_BT = real_BT & ~follows_BT & (piece_BT + 1 < len(layout.start))
            after_BT = layout.doc[np.minimum(piece_BT + 1, len(layout.start) - 1)]
            next_doc_BT, next_offset_BT = np.where(joins_BT, after_BT, doc_BT), np.where(joins_BT, 0, offset_BT + 1)
            follows_BT = follows_BT | joins_BT
        # One call for tokens and targets, so that stored documents are read only once.
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
        """Return the token ids at given positions of documents, with the shape of the arguments.

        Args:
            doc: Index of the document.
            offset: Index of the token in the document, including `bos` and `eos`.
            where: Whether there is a token; otherwise the result is the padding token.
        """
        bos = self._tokenizer.add_bos
        out = np.full(doc.shape, self._tokenizer.pad_id, np.int32)
        last = self._length_D[doc] - 1
        out[where & (offset == last)] = self._tokenizer.eos_id
        if bos:
            out[where & (offset == 0)] = self._tokenizer.bos_id
        text = where & (offset >= bos) & (offset < last)
        out[text] = self._corpus.tokens[self._start_D[doc[text]] + offset[text] - bos]
        return out

    def _epoch(self, epoch: int) -> tuple[Layout, np.ndarray | None]:
        """Return the positions of all pieces in an epoch, and the permutation of the epoch's rows.

        If the documents are shuffled instead of the rows, the permutation is None.
        """
        key = epoch if self.shuffle else 0
        with self._lock:  # several threads read rows; one of them computes the layout
            if key not in self._epochs:
                while len(self._epochs) > 1:  # two, because a batch may contain rows of two epochs
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
    """Pack documents into rows by best fit: longest first, each into the fullest row that has enough space.

    Longer documents are first split into pieces of `seq_len` tokens.

    Args:
        length_D: Number of tokens of each document.
        seq_len: Number of tokens per row.

    Returns:
        The positions of the pieces in the concatenation of all rows, and the number of rows.
    """
    count_D = -(-length_D // seq_len)
    doc_P = np.repeat(np.arange(len(length_D)), count_D)
    first_P = (np.arange(len(doc_P)) - np.repeat(np.cumsum(count_D) - count_D, count_D)) * seq_len
    length_P = np.minimum(seq_len, length_D[doc_P] - first_P)
    start_P = np.zeros(len(doc_P), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit k is set if some row has space for exactly k more tokens
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
