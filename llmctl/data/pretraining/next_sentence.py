"""Build rows of two texts A and B for next-sentence prediction: B follows A in a document, or does not.

The objective is BERT's (Devlin et al., 2018, arXiv:1810.04805).

Shapes: B rows, T tokens per row, D documents, N passages.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.corpus import Documents
from llmctl.data.pretraining.objectives import masked, positions_of, uniform
from llmctl.data.pretraining.packing import Batch, Packed
from llmctl.data.shuffle import Epochs
from llmctl.data.tokenizers.vocabulary import Vocabulary

GROUP = 8
"""Number of passages per group. Passages are only combined with passages of the same group. Each passage has two rows,
so a group has 2 * GROUP rows."""
MIN_LABELED = 0.05
"""Minimum fraction of rows with a next-sentence label. With a smaller fraction, the next-sentence head would hardly
learn."""
MIN_TOKENS = 3
"""Minimum number of document tokens before and after a sentence boundary, because a few tokens are no sentence."""
IS_NEXT, NOT_NEXT, NO_PAIR = 0, 1, -1
"""Values of `next_label`: 0 if B follows A and 1 if not, as in BERT; -1 for a row without a label."""


class PairRows:
    """Build rows `bos A eos B eos` with masked tokens, for next-sentence prediction.

    A passage is a part of a document. Each passage is divided at a sentence boundary into A and B. A row contains A and
    B from the same passage (next_label 0), or from passages of different documents (next_label 1). For both labels, A
    and B have up to half a row each. Lengths therefore do not reveal the label.

    Two passages of different documents give four rows: each A with its own B, then each A with the other B. Each A
    therefore occurs once with each label, and so does each B. The masked tokens of A are the same in both rows with
    this A, and likewise for B. A alone, or B alone, thus does not predict the label. If pairs were independent, the
    label would correlate by chance with A or B alone. A small network would fit these correlations for thousands of
    steps, before it compares A with B.

    The two combined passages are called partners. Partners are in the same group of `GROUP` passages. In each group,
    exactly half of the rows with a label have next_label 0. A passage without a partner has two rows `bos A eos B eos`
    with next_label -1 (no label). If such a passage has no sentence boundary, these rows are `bos A eos`.

    A document of n tokens has about n / T passages per epoch. Each passage has two rows. The offset of a passage in its
    document is sampled again in every epoch. Rows exist for all row numbers, because there is no last epoch.
    `len(rows)` is the number of rows per epoch.
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
        """Compute the number of passages in each document.

        Args:
            corpus: Tokenized documents.
            words: Vocabulary of the tokenizer, with a mask token.
            seq_len: Number of tokens per row.
            rate: Fraction of tokens to predict (see `objectives.masked`).
            whole_words: Whether to mask whole words (see `objectives.masked`).
            seed: Seed of the shuffle, the splits of documents into passages, and the masks.
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
        """Return the fraction of rows with a next-sentence label, estimated on up to 512 passages."""
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
            The arrays of `objectives.masked`, and two more:
            - `types`, int32 [B, T]: 1 for the tokens of `B eos`, 0 for all other positions
            - `next_label`, int32 [B]: 0 if B follows A, 1 if not, -1 for a row without a label
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
            "places": positions_of(weights_BT > 0, self._rate),
            "types": ((at > a_B1 + 1) * segments_BT).astype(np.int32),
            "next_label": label_B.astype(np.int32),
        }

    def _masked(self, number_N: np.ndarray, doc_N: np.ndarray, start_N: np.ndarray, length_N: np.ndarray) -> Batch:
        """Apply masked language modeling to N texts, each in its own row of T tokens.

        Args:
            number_N: Numbers of the texts, which determine the random choices.
            doc_N: Document of each text.
            start_N: Offset of the text in its document, in tokens.
            length_N: Number of tokens of the text.
        """
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
        """Find the passages with the numbers `place_N` in the documents, and divide each passage into A and B.

        If a passage has no sentence boundary, B is empty. The order of the passages is always shuffled, because
        consecutive passages of one document cannot be combined. If `shuffle` is false, every epoch has the same order.

        Returns:
            Three integer arrays, with one row per passage. The first has the document index of each passage [N]. The
            second has the offsets of A and B in the document [N, 2]. The third has the lengths of A and B [N, 2].
            Offsets and lengths are in tokens.
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
        """Return the token index of the sentence start that is nearest to token `near_N` of document `doc_N`.

        The first sentence of a document is excluded.

        Returns:
            Indices int64 [N]; -1 if there is no sentence start within half a row.
        """
        at_NW = near_N[:, None] + np.arange(-(self.seq_len // 2) - 1, self.seq_len // 2 + 1)
        length_N1 = self._length_D[doc_N][:, None]
        real_NW = (at_NW >= 0) & (at_NW < length_N1)
        tokens_NW = np.full(at_NW.shape, self._words.pad_id, np.int64)
        tokens_NW[real_NW] = self._corpus.tokens[(self._start_D[doc_N][:, None] + at_NW)[real_NW]]
        begins_NW = self._words.begins_sentence(tokens_NW[:, :-1], tokens_NW[:, 1:])
        begins_NW &= (at_NW[:, 1:] >= MIN_TOKENS) & (at_NW[:, 1:] <= length_N1 - MIN_TOKENS)
        distance_NW = np.where(begins_NW, np.abs(at_NW[:, 1:] - near_N[:, None]), np.iinfo(np.int64).max)
        best_N = distance_NW.argmin(1)
        found_N = np.take_along_axis(at_NW[:, 1:], best_N[:, None], 1)[:, 0]
        return np.where(begins_NW.any(1), found_N, -1)


def check(labelled: float) -> None:
    """Check that enough rows have a next-sentence label.

    Args:
        labelled: Fraction of rows with a label.

    Raises:
        RequestError: If the fraction is below `MIN_LABELED`.
    """
    if labelled < MIN_LABELED:
        raise RequestError(
            f"next-sentence pairs: {labelled:.1%} of the rows have one, and {MIN_LABELED:.0%} at least are needed: too "
            "few documents have two sentences; use objective = 'masked', or longer documents (data.documents)"
        )


def _partners(doc_N: np.ndarray, pair_N: np.ndarray) -> np.ndarray:
    """Find a partner for each passage among the passages of the same group.

    A of each partner is later combined with B of the other.

    Partners are from different documents, and both have a nonempty B.

    Args:
        doc_N: Document of each passage; N is a multiple of GROUP.
        pair_N: Whether B of each passage is nonempty.

    Returns:
        Index of each passage's partner, int [N]; -1 if the passage has no partner.
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
    """Return (passage of A, passage of B, next_label) of every row, int [2N] each.

    Two combined passages a and b are called partners. They have four rows: (a, a) and (b, b) with label 0, then (a, b)
    and (b, a) with label 1. The passages without a partner follow at the end of the group, without a label. Two such
    passages c and d have the rows (c, c), (d, d), (c, c), (d, d).
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
