"""Define pretraining objectives: functions that build inputs and targets from rows of packed tokens.

The random choices depend only on the number of the row and the seed. A row is therefore the same in every process and
at every read. In another epoch, the same documents are in rows with other numbers, so the choices differ.

Shapes: B rows, T tokens per row, P predicted positions per row, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from llmctl.data.pretraining.packing import Batch, Packed
from llmctl.data.shuffle import hashed
from llmctl.data.tokenizers.vocabulary import Vocabulary

_STREAM = 2**32
"""Offset of the argument `stream` of `random_bits`. The offset makes the random numbers of objectives independent of
the shuffle."""


def random_bits(rows_B: np.ndarray, width: int, seed: int, stream: int) -> np.ndarray:
    """Return random 64-bit integers, uint64 [B, width], which are the same for the same arguments.

    Args:
        rows_B: Row numbers. Each row of the result depends only on its row number, not on the other rows.
        width: Number of integers per row.
        seed: Seed of the random choices.
        stream: Number that distinguishes the purposes of random numbers, such as choosing tokens and replacing tokens.
            Different streams are independent.
    """
    numbers_BT = rows_B.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(width, dtype=np.uint64)
    return hashed(numbers_BT.ravel(), seed, _STREAM + stream).reshape(numbers_BT.shape)


def uniform(rows_B: np.ndarray, width: int, seed: int, stream: int) -> np.ndarray:
    """Return uniform random numbers in [0, 1), float64 [B, width]; `random_bits` describes the arguments."""
    return (random_bits(rows_B, width, seed, stream) >> np.uint64(11)) * 2.0**-53


def round_up_to_8(n: float) -> int:
    """Round `n` up to a multiple of 8, so that arrays of this size can be split into chunks."""
    return -(-int(np.ceil(n)) // 8) * 8


def masked(packed: Packed, words: Vocabulary, *, rate: float = 0.15, whole_words: bool = False, seed: int = 0) -> Batch:
    """Apply masked language modeling (Devlin et al., 2018, arXiv:1810.04805) to packed rows.

    A fraction of the tokens is chosen for prediction. 80 % of the chosen tokens become the mask token, 10 % a random
    token, and 10 % stay.

    Args:
        packed: Packed rows; special tokens are never chosen.
        words: Vocabulary of the tokenizer, with a mask token.
        rate: Fraction of the row's ordinary tokens to choose; at least one token is chosen.
        whole_words: Whether to choose all tokens of a word or none. The fraction of chosen tokens is then slightly
            below `rate`.
        seed: Seed of the random choices.

    Returns:
        A batch with these arrays:
        - `tokens`, `targets`, `segments`, `positions`: int32 [B, T]
        - `weights`, float32 [B, T]: 1 at chosen positions, else 0
        - `places`, int32 [B, P]: the positions of the chosen tokens (see `positions_of`)
    """
    tokens_BT, T = packed.tokens, packed.tokens.shape[1]
    ordinary_BT = (packed.segments > 0) & ~words.special[tokens_BT]
    wanted_B = ordinary_BT.sum(1)
    wanted_B = np.where(wanted_B > 0, np.maximum(1, np.rint(rate * wanted_B)), 0).astype(np.int64)
    chance_BT = uniform(packed.rows, T, seed, 0)
    if whole_words:
        chosen_BT = _whole_words(packed, words, ordinary_BT, wanted_B, chance_BT)
    else:
        rank_BT = np.argsort(np.argsort(np.where(ordinary_BT, chance_BT, 2.0), axis=1), axis=1)
        chosen_BT = rank_BT < wanted_B[:, None]
    kind_BT = uniform(packed.rows, T, seed, 1)
    ids = words.ordinary
    random_BT = ids[random_bits(packed.rows, T, seed, 2) % np.uint64(len(ids))]
    replaced_BT = np.where(kind_BT < 0.8, words.mask_id, np.where(kind_BT < 0.9, random_BT, tokens_BT))
    return {
        "tokens": np.where(chosen_BT, replaced_BT, tokens_BT).astype(np.int32),
        "targets": np.where(chosen_BT, tokens_BT, words.pad_id).astype(np.int32),
        "weights": chosen_BT.astype(np.float32),
        "segments": packed.segments,
        "positions": packed.positions,
        "places": positions_of(chosen_BT, rate),
    }


def positions_of(chosen_BT: np.ndarray, rate: float) -> np.ndarray:
    """Return the positions of the chosen tokens of each row, in ascending order, int32 [B, P].

    P is `rate` * T rounded up to a multiple of 8, but at most T. If a row has fewer than P chosen tokens, its first
    tokens that are not chosen are included too.

    Args:
        chosen_BT: Whether each token is chosen, bool [B, T].
        rate: Fraction of the tokens that may be chosen.
    """
    T = chosen_BT.shape[1]
    most = min(T, round_up_to_8(np.rint(rate * T)))
    return np.sort(np.argsort(~chosen_BT, axis=1, kind="stable")[:, :most], axis=1).astype(np.int32)


def _whole_words(
    packed: Packed, words: Vocabulary, ordinary_BT: np.ndarray, wanted_B: np.ndarray, chance_BT: np.ndarray
) -> np.ndarray:
    """Choose whole words in random order, up to a number of tokens per row.

    A word that would exceed this number is skipped.

    Args:
        packed: Packed rows.
        words: Vocabulary of the tokenizer.
        ordinary_BT: Whether each token may be chosen.
        wanted_B: Maximum number of tokens to choose in each row.
        chance_BT: Random numbers that define the order.

    Returns:
        Mask of the chosen tokens, bool [B, T].
    """
    B, T = ordinary_BT.shape
    before_BT = np.pad(packed.tokens, ((0, 0), (1, 0)))[:, :-1]
    apart_BT = np.diff(packed.segments, axis=1, prepend=-1) != 0
    starts_BT = words.begins[packed.tokens] | words.closes[before_BT] | apart_BT
    first_BT = np.maximum.accumulate(np.where(starts_BT, np.arange(T), 0), axis=1)
    word_BT = first_BT + T * np.arange(B)[:, None]
    length_BT = np.bincount(word_BT[ordinary_BT], minlength=B * T)[word_BT]
    chance_BT = np.take_along_axis(chance_BT, first_BT, axis=1)
    chosen_BT = np.zeros_like(ordinary_BT)
    for _ in range(4):  # later rounds choose shorter words for the tokens that skipped words left
        room_B1 = wanted_B[:, None] - chosen_BT.sum(1, keepdims=True)
        open_BT = ordinary_BT & ~chosen_BT & (length_BT <= room_B1)
        order_BT = np.argsort(np.where(open_BT, chance_BT, 2.0), axis=1, kind="stable")
        rank_BT = np.argsort(order_BT, axis=1)
        # The last token of a word must fit. The tokens of a word are adjacent in the order.
        last_B = np.zeros(B * T, np.int64)
        np.maximum.at(last_B, word_BT[open_BT], rank_BT[open_BT])
        chosen_BT |= open_BT & (last_B[word_BT] < room_B1)
    return chosen_BT
