"""Build pairs of passages for next-sentence prediction: the second passage follows the first one, or it does not.

The objective is BERT's (Devlin et al., 2018, arXiv:1810.04805).

Shapes: B rows, T tokens per row, D documents, N passages, W tokens of a window.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.corpus import Documents
from llmctl.data.pretraining.objectives import masked, places, uniform
from llmctl.data.pretraining.packing import Batch, Packed
from llmctl.data.shuffle import Epochs
from llmctl.data.tokenizers.vocabulary import Vocabulary

GROUP = 8
"""Number of passages per group. A group fills 2 * GROUP rows, and pairs across documents are formed within it."""
FEWEST = 0.05
"""Minimum fraction of rows with a labeled pair, because fewer would hardly train the next-sentence head."""
LEAST = 3
"""Minimum number of document tokens before and after a cut, because a space at the end is no sentence."""
IS_NEXT, NOT_NEXT, NO_PAIR = 0, 1, -1
"""Values of `next_label`, as in BERT."""


class PairRows:
    """Build masked rows `bos A eos B eos` for next-sentence prediction. Rows are endless; `len(rows)` is one epoch.

    B follows A in exactly half of the labeled rows of a group of 2 * GROUP rows. A read that ends inside a group is not
    exactly balanced, because true pairs come first in a block of four. A ends at the end of a sentence. B begins at the
    start of a sentence, in A's document (next_label 0) or in another one (next_label 1). A and B take up to half a row
    each, for both labels, so lengths do not reveal the label.

    A block of four rows combines two passages from different documents: each A with its own B, then each A with the
    other B. The masks of A and of B are the same in both of their rows. Every passage is thus labeled true and false
    equally often within four rows. Features of A alone or B alone then cancel in a step's gradient. Without this, a
    small network fits such random correlations for thousands of steps before it compares the passages.

    Passages are processed in groups of `GROUP`. Within a group, passages with a sentence boundary nearby are paired
    across documents. Labels are therefore balanced in every group. A passage without a partner fills two rows `bos A
    eos B eos` with next_label -1. If there is no sentence boundary nearby, these rows are `bos A eos`. Such rows have
    masks but no label.

    A document of n tokens has about n / T passages per epoch, one for each of its parts. Each passage has two rows. The
    exact cut is sampled again in every epoch.
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
        """Count the passages of the corpus.

        Args:
            corpus: Tokenized documents.
            words: Vocabulary of the tokenizer, with a mask token.
            seq_len: Number of tokens per row.
            rate: Fraction of tokens to predict, as in `objectives.masked`.
            whole_words: Whether to mask whole words, as in `objectives.masked`.
            seed: Seed of the shuffle, cuts and masks.
            shuffle: Whether to shuffle in every epoch.

        Raises:
            RequestError: If rows are too short for a pair, or if no document has two tokens.
        """
        if seq_len < 8:
            raise RequestError(f"train.seq_len: {seq_len} tokens are too few for a pair of sentences; 8 at least")
        self.seq_len, self._corpus, self._words, self._seed = seq_len, corpus, words, seed
        self._rate, self._whole_words = rate, whole_words
        self._length_D = np.asarray(corpus.lengths, np.int64)
        self._start_D = np.cumsum(self._length_D) - self._length_D
        parts_D = np.where(self._length_D > 1, np.maximum(1, np.rint(self._length_D / (seq_len - 3))), 0).astype(
            np.int64
        )
        self._first_D = np.concatenate([[0], np.cumsum(parts_D)])
        if not self._first_D[-1]:
            raise RequestError("the corpus has no document of two tokens; nothing to make pairs of")
        self._shuffle, self._order = shuffle, Epochs(self._count, seed, shuffle=True)
        self.tokens = int(self._length_D.sum())
        """Total number of tokens of the documents."""

    @cached_property
    def labelled(self) -> float:
        """Return the fraction of rows with a labeled pair, estimated on up to 512 passages.

        Half of these pairs are true.
        """
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
        """Return the fraction of positions that are padding, estimated on 64 rows."""
        some = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        return float(1 - (self.batch(some)["segments"] > 0).mean())

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `rows_B` (any >= 0).

        Returns:
            The arrays of `objectives.masked`, types int32 [B, T] (1 from B on), and next_label int32 [B].
        """
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
        """Mask passages as separate rows [N, T]. The random choices depend only on the passage number and the seed."""
        at = np.arange(self.seq_len)
        inside_NT = at < length_N[:, None]
        tokens_NT = np.full(inside_NT.shape, self._words.pad_id, np.int32)
        which_N, offset_N = np.nonzero(inside_NT)
        tokens_NT[inside_NT] = self._corpus.tokens[(self._start_D[doc_N] + start_N)[which_N] + offset_N]
        segments_NT = inside_NT.astype(np.int32)
        last_NT = np.zeros_like(inside_NT)
        packed = Packed(number_N, tokens_NT, tokens_NT, last_NT, segments_NT, (at * segments_NT).astype(np.int32))
        return masked(packed, self._words, rate=self._rate, whole_words=self._whole_words, seed=self._seed)

    def _passages(self, place_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the passages with the numbers `place_N`.

        If there is no sentence boundary nearby, B is empty. Without `shuffle`, every epoch has the shuffled order of
        the first epoch. With the order of the documents, consecutive passages would come from one document and could
        not be paired.

        Returns:
            Document [N], starts of A and B [N, 2], lengths of A and B [N, 2].
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
        around_N = np.clip(near_N - alone // 2, 0, np.maximum(length_N - alone, 0))  # position of A if there is no pair
        start_N = np.where(pair_N, np.maximum(cut_N - (room - room // 2), 0), around_N)
        end_N = np.where(pair_N, cut_N, np.minimum(around_N + alone, length_N))
        second_N = np.where(pair_N, np.minimum(length_N - cut_N, room // 2), 0)
        return doc_N, np.stack([start_N, cut_N], 1), np.stack([end_N - start_N, second_N], 1)

    def _boundary(self, doc_N: np.ndarray, near_N: np.ndarray) -> np.ndarray:
        """Return the sentence start nearest to the token `near_N`, int64 [N]; -1 if there is none within half a row.

        The first sentence of a document is excluded.
        """
        at_NW = near_N[:, None] + np.arange(-(self.seq_len // 2) - 1, self.seq_len // 2 + 1)
        length_N1 = self._length_D[doc_N][:, None]
        real_NW = (at_NW >= 0) & (at_NW < length_N1)
        tokens_NW = np.full(at_NW.shape, self._words.pad_id, np.int64)
        tokens_NW[real_NW] = self._corpus.tokens[(self._start_D[doc_N][:, None] + at_NW)[real_NW]]
        begins_NW = self._words.begins_sentence(tokens_NW[:, :-1], tokens_NW[:, 1:])
        begins_NW &= (at_NW[:, 1:] >= LEAST) & (at_NW[:, 1:] <= length_N1 - LEAST)
        distance_NW = np.where(begins_NW, np.abs(at_NW[:, 1:] - near_N[:, None]), np.iinfo(np.int64).max)
        best_N = distance_NW.argmin(1)
        found_N = np.take_along_axis(at_NW[:, 1:], best_N[:, None], 1)[:, 0]
        return np.where(begins_NW.any(1), found_N, -1)


def check(labelled: float) -> None:
    """Check that enough rows have a labeled pair to train the next-sentence head.

    Raises:
        RequestError: If the fraction is below `FEWEST`.
    """
    if labelled < FEWEST:
        raise RequestError(
            f"next-sentence pairs: {labelled:.1%} of the rows have one, and {FEWEST:.0%} at least are needed: too few "
            "documents have two sentences; use objective = 'masked', or longer documents (data.documents)"
        )


def _partners(doc_N: np.ndarray, pair_N: np.ndarray) -> np.ndarray:
    """Return the index of each passage's partner in its group, int [N]; -1 if it has none.

    Partners come from different documents, and both have a B. Each passage gets the next free partner, in order. N must
    be a multiple of GROUP.
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
    """Return (passage of A, passage of B, next_label) of every row, int [2N] each, in blocks of four rows per group.

    A block of partners a and b has two true pairs, (a, a) and (b, b), then two false ones, (a, b) and (b, a). After
    these blocks, passages without a partner follow, two per block: (c, c), (d, d), and both again, unlabeled.
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
