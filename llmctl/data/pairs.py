"""Sentence pairs of documents, to learn from them whether the second passage follows the first (BERT).

Legend: B rows, T tokens a row, D documents, W tokens of a window.
"""

from __future__ import annotations

import numpy as np

from llmctl.data.corpus import Documents
from llmctl.data.objectives import Batch, Packed, masked, uniform
from llmctl.data.order import Epochs
from llmctl.data.vocabulary import Vocabulary
from llmctl.errors import RequestError

LEAST = 3
"""Tokens of the document before and after a cut, at least: a space at the end is no sentence."""
IS_NEXT, NOT_NEXT, NO_PAIR = 0, 1, -1
"""`next_label`, as BERT has it."""


class PairRows:
    """Masked rows `bos A eos B eos`, of which half say the truth: B follows A. Endless; `len(rows)` are an epoch.

    A ends where a sentence of its document ends and B begins where one begins, in A's document (next_label 0) or in
    another (next_label 1). Both take up to half a row, whatever the label, so that lengths say nothing about it. Where
    a document has no second sentence near, a row is `bos A eos` with next_label -1: masks, but no pair.

    Four rows are of two documents: each A with its own B, then each with the other's. Every passage is true as often
    as it is false, side by side, so that what A or B alone might say cancels out of a step's gradient. Without this a
    small network is busy with such chance for thousands of steps before it compares the two.

    A document of n tokens has about n / T such passages an epoch, one for each of its parts, in two rows each; where
    exactly a pair is cut is drawn anew in every epoch.
    """

    def __init__(
        self,
        corpus: Documents,
        words: Vocabulary,
        seq_len: int,
        *,
        rate: float = 0.15,
        whole_words: bool = False,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """`rate` and `whole_words` as in `objectives.masked`.

        Raises RequestError for rows too short for a pair, or a corpus without a document of two tokens.
        """
        if seq_len < 8:
            raise RequestError(f"train.seq_len: {seq_len} tokens are too few for a pair of sentences; 8 at least")
        self.seq_len, self._corpus, self._words, self._seed = seq_len, corpus, words, seed
        self._rate, self._whole_words = rate, whole_words
        self._length_D = np.asarray(corpus.lengths, np.int64)
        parts_D = np.where(self._length_D > 1, np.maximum(1, np.rint(self._length_D / (seq_len - 3))), 0).astype(
            np.int64
        )
        self._first_D = np.concatenate([[0], np.cumsum(parts_D)])
        if not self._first_D[-1]:
            raise RequestError("the corpus has no document of two tokens; nothing to make pairs of")
        self._shuffle, self._order = shuffle, Epochs(self._passages, seed, shuffle=True)
        self.tokens = int(self._length_D.sum())
        """Tokens of the documents."""

    @property
    def _passages(self) -> int:
        return int(self._first_D[-1])

    def __len__(self) -> int:
        return 2 * self._passages

    @property
    def waste(self) -> float:
        """Fraction of row places that hold padding, of some rows."""
        some = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        return float(1 - (self.batch(some)["segments"] > 0).mean())

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Rows `rows_B` (any numbers >= 0): what `objectives.masked` gives, types [B, T] and next_label [B]."""
        B, T = len(rows_B), self.seq_len
        room = T - 3
        most_b = room // 2
        most_a = room - most_b
        first_B, k_B = rows_B // 4 * 2, rows_B % 4
        place_N, at_2B = np.unique([first_B + k_B % 2, first_B + 1 - k_B % 2], return_inverse=True)
        found_N = self._passages_at(place_N)
        (doc_B, next_doc_B), (cut_B, next_B), (near_B, _) = (x_N[at_2B.reshape(2, B)] for x_N in found_N)
        pair_B = cut_B >= 0
        false_B = pair_B & (k_B > 1) & (next_B >= 0) & (next_doc_B != doc_B)
        next_doc_B, next_B = np.where(false_B, next_doc_B, doc_B), np.where(false_B, next_B, cut_B)
        # without a pair: what lies around the place
        alone_B = np.clip(near_B - (T - 2) // 2, 0, np.maximum(self._length_D[doc_B] - (T - 2), 0))
        end_B = np.where(pair_B, cut_B, np.minimum(alone_B + T - 2, self._length_D[doc_B]))
        start_B = np.where(pair_B, np.maximum(cut_B - most_a, 0), alone_B)
        a_B1 = (end_B - start_B)[:, None]
        b_B1 = np.where(pair_B, np.minimum(self._length_D[next_doc_B] - next_B, most_b), 0)[:, None]
        at = np.arange(T)
        in_a_BT, in_b_BT = (at > 0) & (at <= a_B1), (at > a_B1 + 1) & (at < a_B1 + 2 + b_B1)
        offset_BT = np.where(in_a_BT, start_B[:, None] + at - 1, next_B[:, None] + at - a_B1 - 2)
        source_BT = np.where(in_a_BT, doc_B[:, None], next_doc_B[:, None])
        text_BT = in_a_BT | in_b_BT
        tokenizer = self._words.tokenizer
        tokens_BT = np.full((B, T), tokenizer.pad_id, np.int32)
        tokens_BT[text_BT] = self._corpus.gather(source_BT[text_BT], offset_BT[text_BT])
        tokens_BT[:, 0] = tokenizer.bos_id
        tokens_BT[(at == a_B1 + 1) | (pair_B[:, None] & (at == a_B1 + b_B1 + 2))] = tokenizer.eos_id
        segments_BT = (at < np.where(pair_B[:, None], a_B1 + b_B1 + 3, a_B1 + 2)).astype(np.int32)
        packed = Packed(
            rows_B, tokens_BT, tokens_BT, np.zeros((B, T), bool), segments_BT, (at * segments_BT).astype(np.int32)
        )
        batch = masked(packed, self._words, rate=self._rate, whole_words=self._whole_words, seed=self._seed)
        label_B = np.where(pair_B, np.where(false_B, NOT_NEXT, IS_NEXT), NO_PAIR)
        types_BT = (at > a_B1 + 1) * segments_BT
        return batch | {"types": types_BT.astype(np.int32), "next_label": label_B.astype(np.int32)}

    def _passages_at(self, place_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, where in it B begins or -1, the token that was drawn) of the passages at places of the order.

        Without `shuffle` it is the order of the first epoch again and again: in the documents' own order, neighbours
        would be of one document.
        """
        if not self._shuffle:
            place_N = place_N % self._passages
        slot_N, share_N = self._order(place_N), uniform(place_N, 1, self._seed, 10)[:, 0]
        doc_N = np.searchsorted(self._first_D, slot_N, "right") - 1
        parts_N = self._first_D[doc_N + 1] - self._first_D[doc_N]
        near_N = ((slot_N - self._first_D[doc_N] + share_N) * self._length_D[doc_N] / parts_N).astype(np.int64)
        return doc_N, self._boundary(doc_N, near_N), near_N

    def _boundary(self, doc_N: np.ndarray, near_N: np.ndarray) -> np.ndarray:
        """The begin of a sentence, not the document's first, nearest to a token within half a row; -1 for none."""
        at_NW = near_N[:, None] + np.arange(-(self.seq_len // 2) - 1, self.seq_len // 2 + 1)
        length_N1 = self._length_D[doc_N][:, None]
        real_NW = (at_NW >= 0) & (at_NW < length_N1)
        tokens_NW = np.full(at_NW.shape, self._words.pad_id, np.int64)
        tokens_NW[real_NW] = self._corpus.gather(np.broadcast_to(doc_N[:, None], at_NW.shape)[real_NW], at_NW[real_NW])
        words, last_NW, this_NW = self._words, tokens_NW[:, :-1], tokens_NW[:, 1:]
        begins_NW = words.stops[last_NW] & words.spaced[this_NW] | words.hard_stops[last_NW]
        begins_NW &= (at_NW[:, 1:] >= LEAST) & (at_NW[:, 1:] <= length_N1 - LEAST)
        distance_NW = np.where(begins_NW, np.abs(at_NW[:, 1:] - near_N[:, None]), np.iinfo(np.int64).max)
        best_N = distance_NW.argmin(1)
        found_N = np.take_along_axis(at_NW[:, 1:], best_N[:, None], 1)[:, 0]
        return np.where(begins_NW.any(1), found_N, -1)
