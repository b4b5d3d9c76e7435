"""Compute properties of tokens that pretraining objectives need: special tokens, word boundaries and sentence ends.

Shapes: V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.base import Tokenizer

STOPS = ".!?"
"""Characters that end a sentence if white space follows."""
HARD_STOPS = "\n。｡！？।॥؟۔։።။។"
"""Characters that always end a sentence, in Chinese, Japanese, Hindi, Arabic, Urdu, Armenian, Amharic, Burmese and
Khmer."""
CLOSERS = "\"')]”’"


@dataclass(frozen=True)
class Vocabulary:
    """Compute properties of a tokenizer's vocabulary, as boolean arrays [V]."""

    tokenizer: Tokenizer

    @property
    def pad_id(self) -> int:
        """Return the id of the padding token."""
        return self.tokenizer.pad_id

    @property
    def mask_id(self) -> int:
        """Return the id of the mask token.

        Raises:
            RequestError: If the tokenizer has no mask token.
        """
        if self.tokenizer.mask_id is None:
            raise RequestError("the tokenizer has no mask token, which masked language modelling needs")
        return self.tokenizer.mask_id

    @cached_property
    def special(self) -> np.ndarray:
        """Return a mask bool [V] of special tokens. Objectives never mask these tokens, and span corruption never drops
        them."""
        t = self.tokenizer
        marks = [t.pad_id, t.bos_id, t.eos_id, *t.sentinel_ids]
        special_V = np.zeros(t.vocab_size, bool)
        special_V[marks if t.mask_id is None else [*marks, t.mask_id]] = True
        return special_V

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Return the ids of all tokens that are neither special nor unknown, int32 [N]."""
        return np.setdiff1d(np.flatnonzero(~self.special), [self.tokenizer.unk_id]).astype(np.int32)

    @cached_property
    def _pieces(self) -> list[str]:
        return self.tokenizer.pieces()

    @cached_property
    def begins(self) -> np.ndarray:
        """Return a mask bool [V] of tokens that begin with a space or punctuation. These tokens begin a word."""
        return np.array([not p or not _of_word(p[0]) for p in self._pieces])

    @cached_property
    def closes(self) -> np.ndarray:
        """Return a mask bool [V] of tokens after which a word always begins.

        These are special tokens, and tokens that end with punctuation or with white space other than a space. A space
        at the end of a token belongs to the next word.
        """
        return np.array([not p or not (_of_word(p[-1]) or p[-1] == " ") for p in self._pieces])

    @cached_property
    def spaced(self) -> np.ndarray:
        """Return a mask bool [V] of tokens that begin with white space."""
        return np.array([p[:1].isspace() for p in self._pieces])

    @cached_property
    def stops(self) -> np.ndarray:
        """Return a mask bool [V] of tokens that end a sentence if white space follows."""
        return np.array([p.rstrip(CLOSERS)[-1:] in STOPS and p.rstrip(CLOSERS) != "" for p in self._pieces])

    @cached_property
    def hard_stops(self) -> np.ndarray:
        """Return a mask bool [V] of tokens that always end a sentence."""
        return np.array([p != "" and p[-1] in HARD_STOPS for p in self._pieces])

    @cached_property
    def _marks(self) -> np.ndarray:
        """Return a mask bool [V] of tokens that end with "!" or "?".

        Tokenizers with NFKC normalization convert the full-width marks of Chinese and Japanese to these marks.
        """
        return np.array([p.rstrip(CLOSERS)[-1:] in ("!", "?") for p in self._pieces])

    @cached_property
    def _ideographs(self) -> np.ndarray:
        """Return a mask bool [V] of tokens that begin with a Chinese or Japanese character. No space precedes such
        tokens."""
        return np.array([_in(p[:1], "\u3040", "\u30ff") or _in(p[:1], "\u3400", "\u9fff") for p in self._pieces])

    @cached_property
    def _thai(self) -> tuple[np.ndarray, np.ndarray]:
        """Return two masks bool [V]: tokens that end with a Thai character, and tokens that separate Thai sentences.

        Two kinds of tokens separate sentences: a single space, and a space followed by a Thai character.
        """
        thai = [(p, p.strip()) for p in self._pieces]
        ends = np.array([_in(p[-1:], "\u0e01", "\u0e5b") for p, _ in thai])
        return ends, np.array([p[:1] == " " and (not text or _in(text[0], "\u0e01", "\u0e5b")) for p, text in thai])

    def begins_sentence(self, last: np.ndarray, this: np.ndarray) -> np.ndarray:
        """Return, for each pair of consecutive tokens, whether a sentence begins with the second token.

        After a full stop, exclamation mark or question mark, a sentence begins with white space. After an exclamation
        mark or question mark, a sentence may also begin with a Chinese or Japanese character. In Thai, a space
        separates sentences.

        Args:
            last: Ids of the first tokens of the pairs, of any shape.
            this: Ids of the second tokens of the pairs, of the same shape.

        Returns:
            Booleans of the same shape.
        """
        thai_ends, thai_begins = self._thai
        found = self.stops[last] & self.spaced[this] | self.hard_stops[last]
        return found | self._marks[last] & self._ideographs[this] | thai_ends[last] & thai_begins[this]


def _in(character: str, first: str, last: str) -> bool:
    return character != "" and first <= character <= last


def _of_word(character: str) -> bool:
    # A single byte of a multi-byte character decodes to the replacement character.
    return character.isalnum() or character in "_\ufffd"
