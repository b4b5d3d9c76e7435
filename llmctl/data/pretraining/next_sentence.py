"""Sentence pairs of documents, to learn from them whether the second passage follows the first (BERT).

Legend: B rows, T tokens a row, D documents, W tokens of a window.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.corpus import Documents
from llmctl.data.pretraining.objectives import Batch, Packed, masked, places, uniform
from llmctl.data.shuffle import Epochs
from llmctl.data.tokenizers.vocabulary import Vocabulary

GROUP = 8
"""Passages among which pairs of two documents are formed; they are 2 * GROUP rows."""
FEWEST = 0.05
"""Smallest fraction of rows with a labelled pair; with fewer the next-sentence head would hardly be trained."""
LEAST = 3
"""Tokens of the document before and after a cut, at least: a space at the end is no sentence."""
IS_NEXT, NOT_NEXT, NO_PAIR = 0, 1, -1
"""`next_label`, as BERT has it."""


class PairRows:
    """Masked rows `bos A eos B eos`; B follows A in exactly half of the labelled ones. Endless; `len(rows)` per epoch.

    A ends where a sentence of its document ends and B begins where one begins, in A's document (next_label 0) or in
    another (next_label 1). Both take up to half a row, whatever the label, so that lengths say nothing about it.

    Four rows are of two documents: each A with its own B, then each A with the other's B. The masks of a passage are
    the same in both of its rows. Every passage is true as often as it is false, side by side, so that what A or B alone
    might say cancels out of a step's gradient. Without this a small network learns such chance for thousands of steps
    before it compares the two.

    Passages are taken in groups of `GROUP`. Within a group those that have a second sentence near are combined in twos
    of different documents, so the labels are balanced in every group. A passage that finds no partner, or has no second
    sentence near, fills two rows `bos A eos B eos` or `bos A eos` with next_label -1: masks, but no pair.

    A document of n tokens has about n / T such passages per epoch, one for each of its parts, in two rows each. The
    exact cut of a pair is sampled anew in every epoch.
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

        Raises:
          RequestError: rows are too short for a pair, or no document has two tokens.
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
        self._shuffle, self._order = shuffle, Epochs(self._count, seed, shuffle=True)
        self.tokens = int(self._length_D.sum())
        """Tokens of the documents."""

    @cached_property
    def labelled(self) -> float:
        """Fraction of the rows that have a labelled pair, half of them true; measured on up to 512 passages."""
        groups = np.unique(np.linspace(0, (len(self) - 1) // (2 * GROUP), 64).astype(np.int64))
        place_N = (groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
        doc_N, _, length_N2 = self._passages(place_N)
        return float((_partners(doc_N, length_N2[:, 1] > 0) >= 0).mean())

    @property
    def _count(self) -> int:
        return int(self._first_D[-1])

    def __len__(self) -> int:
        return 2 * self._count

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
        group_G = np.unique(rows_B // (2 * GROUP))
        place_N = (group_G[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
        doc_N, start_N2, length_N2 = self._passages(place_N)
        partner_N = _partners(doc_N, length_N2[:, 1] > 0)
        at_B = np.searchsorted(group_G, rows_B // (2 * GROUP)) * 2 * GROUP + rows_B % (2 * GROUP)
        own_B, second_B, label_B = (column[at_B] for column in _rows(partner_N))
        used_N, again = np.unique(np.concatenate([own_B, second_B]), return_inverse=True)
        own_B, second_B = again.reshape(2, B)
        place_N, doc_N, start_N2, length_N2 = (a[used_N] for a in (place_N, doc_N, start_N2, length_N2))
        pair_B = length_N2[own_B, 1] > 0
        masked_NT = self._masked(
            (place_N[:, None] * 2 + [0, 1]).ravel(), doc_N.repeat(2), start_N2.ravel(), length_N2.ravel()
        )

        at = np.arange(T)
        a_B1, b_B1 = length_N2[own_B, :1], length_N2[second_B, 1:]
        in_a_BT, in_b_BT = (at > 0) & (at <= a_B1), (at > a_B1 + 1) & (at < a_B1 + 2 + b_B1)
        text_BT = in_a_BT | in_b_BT
        passage_BT = np.where(in_a_BT, own_B[:, None] * 2, second_B[:, None] * 2 + 1)[text_BT]
        offset_BT = np.where(in_a_BT, at - 1, at - a_B1 - 2)[text_BT]

        def joined(name: str, blank: int) -> np.ndarray:
            row_BT = np.full((B, T), blank, masked_NT[name].dtype)
            row_BT[text_BT] = masked_NT[name][passage_BT, offset_BT]
            return row_BT

        words = self._words.tokenizer
        tokens_BT = joined("tokens", words.pad_id)
        tokens_BT[:, 0] = words.bos_id
        tokens_BT[(at == a_B1 + 1) | (pair_B[:, None] & (at == a_B1 + b_B1 + 2))] = words.eos_id
        segments_BT = (at < np.where(pair_B[:, None], a_B1 + b_B1 + 3, a_B1 + 2)).astype(np.int32)
        weights_BT = joined("weights", 0)
        return {
            "tokens": tokens_BT,
            "targets": joined("targets", words.pad_id),
            "weights": weights_BT,
            "segments": segments_BT,
            "positions": (at * segments_BT).astype(np.int32),
            "places": places(weights_BT > 0, self._rate),
            "types": ((at > a_B1 + 1) * segments_BT).astype(np.int32),
            "next_label": label_B.astype(np.int32),
        }

    def _masked(self, number_N: np.ndarray, doc_N: np.ndarray, start_N: np.ndarray, length_N: np.ndarray) -> Batch:
        """Passages as rows of their own [N, T], masked; what is drawn depends on a passage's number."""
        at = np.arange(self.seq_len)
        inside_NT = at < length_N[:, None]
        tokens_NT = np.full(inside_NT.shape, self._words.pad_id, np.int32)
        which_N, offset_N = np.nonzero(inside_NT)
        tokens_NT[inside_NT] = self._corpus.gather(doc_N[which_N], start_N[which_N] + offset_N)
        segments_NT = inside_NT.astype(np.int32)
        last_NT = np.zeros_like(inside_NT)
        packed = Packed(number_N, tokens_NT, tokens_NT, last_NT, segments_NT, (at * segments_NT).astype(np.int32))
        return masked(packed, self._words, rate=self._rate, whole_words=self._whole_words, seed=self._seed)

    def _passages(self, place_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document [N], start and length of A and B [N, 2]) at places of the order; B is empty where there is no pair.

        Without `shuffle` it is the order of the first epoch again and again: in the documents' own order, neighbours
        would be of one document.
        """
        if not self._shuffle:
            place_N = place_N % self._count
        slot_N, share_N = self._order(place_N), uniform(place_N, 1, self._seed, 10)[:, 0]
        doc_N = np.searchsorted(self._first_D, slot_N, "right") - 1
        length_N, parts_N = self._length_D[doc_N], self._first_D[doc_N + 1] - self._first_D[doc_N]
        near_N = ((slot_N - self._first_D[doc_N] + share_N) * length_N / parts_N).astype(np.int64)
        cut_N = self._boundary(doc_N, near_N)
        pair_N = cut_N >= 0
        room, alone = self.seq_len - 3, self.seq_len - 2
        around_N = np.clip(near_N - alone // 2, 0, np.maximum(length_N - alone, 0))  # without a pair
        start_N = np.where(pair_N, np.maximum(cut_N - (room - room // 2), 0), around_N)
        end_N = np.where(pair_N, cut_N, np.minimum(around_N + alone, length_N))
        second_N = np.where(pair_N, np.minimum(length_N - cut_N, room // 2), 0)
        return doc_N, np.stack([start_N, cut_N], 1), np.stack([end_N - start_N, second_N], 1)

    def _boundary(self, doc_N: np.ndarray, near_N: np.ndarray) -> np.ndarray:
        """The begin of a sentence, not the document's first, nearest to a token within half a row; -1 for none."""
        at_NW = near_N[:, None] + np.arange(-(self.seq_len // 2) - 1, self.seq_len // 2 + 1)
        length_N1 = self._length_D[doc_N][:, None]
        real_NW = (at_NW >= 0) & (at_NW < length_N1)
        tokens_NW = np.full(at_NW.shape, self._words.pad_id, np.int64)
        tokens_NW[real_NW] = self._corpus.gather(np.broadcast_to(doc_N[:, None], at_NW.shape)[real_NW], at_NW[real_NW])
        begins_NW = self._words.begins_sentence(tokens_NW[:, :-1], tokens_NW[:, 1:])
        begins_NW &= (at_NW[:, 1:] >= LEAST) & (at_NW[:, 1:] <= length_N1 - LEAST)
        distance_NW = np.where(begins_NW, np.abs(at_NW[:, 1:] - near_N[:, None]), np.iinfo(np.int64).max)
        best_N = distance_NW.argmin(1)
        found_N = np.take_along_axis(at_NW[:, 1:], best_N[:, None], 1)[:, 0]
        return np.where(begins_NW.any(1), found_N, -1)


def check(labelled: float) -> None:
    """Raise RequestError if too few rows have a labelled pair to train the next-sentence head."""
    if labelled < FEWEST:
        raise RequestError(
            f"next-sentence pairs: {labelled:.1%} of the rows have one, and {FEWEST:.0%} at least are needed: too few "
            "documents have two sentences; use objective = 'masked', or longer documents (data.documents)"
        )


def _partners(doc_N: np.ndarray, pair_N: np.ndarray) -> np.ndarray:
    """Return the index of each passage's partner in its group: another document's, and both have a pair; -1 for none.

    In order: each passage takes the next free one. The arrays hold whole groups.
    """
    partner_N = np.full(len(doc_N), -1)
    for start in range(0, len(doc_N), GROUP):
        free = [start + k for k in range(GROUP) if pair_N[start + k]]
        while free:
            one = free.pop(0)
            other = next((n for n in free if doc_N[n] != doc_N[one]), None)
            if other is not None:
                free.remove(other)
                partner_N[[one, other]] = other, one
    return partner_N


def _rows(partner_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (passage of A, passage of B, next_label) of every row [2N], a group's four-row blocks one after the other.

    A block of two partners a and b: (a, a), (b, b) true, (a, b), (b, a) false. The passages without a partner follow,
    two to a block: (c, c), (d, d) and the same again, unlabelled.
    """
    first, second, label = [], [], []
    for start in range(0, len(partner_N), GROUP):
        here = range(start, start + GROUP)
        twos = [(n, int(partner_N[n])) for n in here if n < partner_N[n]]
        alone = [n for n in here if partner_N[n] < 0]
        blocks = [(two, True) for two in twos] + [(two, False) for two in zip(alone[::2], alone[1::2], strict=True)]
        for (a, b), paired in blocks:
            first += [a, b, a, b]
            second += [a, b, b, a] if paired else [a, b, a, b]
            label += [IS_NEXT, IS_NEXT, NOT_NEXT, NOT_NEXT] if paired else [NO_PAIR] * 4
    return np.array(first), np.array(second), np.array(label)
