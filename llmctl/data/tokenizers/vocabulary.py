"""What objectives know about tokens: which are special, where words begin, where sentences end.

Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.base import Tokenizer

STOPS = ".!?"
"""End a sentence if white space follows."""
HARD_STOPS = "\n。｡！？।॥؟۔։።။។"
"""End a sentence whatever follows: Chinese, Japanese, Hindi, Arabic, Urdu, Armenian, Amharic, Burmese, Khmer."""
CLOSERS = "\"')]”’"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's vocabulary as arrays [V]."""

    tokenizer: Tokenizer

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return self.tokenizer.pad_id

    @property
    def mask_id(self) -> int:
        """The mask. Raises RequestError where the tokenizer has none."""
        if self.tokenizer.mask_id is None:
            raise RequestError("the tokenizer has no mask token, which masked language modelling needs")
        return self.tokenizer.mask_id

    @cached_property
    def special(self) -> np.ndarray:
        """bool: never masked, never part of a span."""
        t = self.tokenizer
        marks = [t.pad_id, t.bos_id, t.eos_id, *t.sentinel_ids]
        special_V = np.zeros(t.vocab_size, bool)
        special_V[marks if t.mask_id is None else [*marks, t.mask_id]] = True
        return special_V

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Ids of the tokens that text is made of."""
        return np.setdiff1d(np.flatnonzero(~self.special), [self.tokenizer.unk_id]).astype(np.int32)

    @cached_property
    def _pieces(self) -> list[str]:
        return self.tokenizer.pieces()

    @cached_property
    def begins(self) -> np.ndarray:
        """bool: a word begins with this token (a space before it, or punctuation)."""
        return np.array([not p or not _of_word(p[0]) for p in self._pieces])

    @cached_property
    def closes(self) -> np.ndarray:
        """bool: whatever comes after this token begins a word; a lone space belongs to what follows."""
        return np.array([not p or not (_of_word(p[-1]) or p[-1] == " ") for p in self._pieces])

    @cached_property
    def spaced(self) -> np.ndarray:
        """bool: the token begins with white space."""
        return np.array([p[:1].isspace() for p in self._pieces])

    @cached_property
    def stops(self) -> np.ndarray:
        """bool: a sentence ends with this token if white space follows."""
        return np.array([p.rstrip(CLOSERS)[-1:] in STOPS and p.rstrip(CLOSERS) != "" for p in self._pieces])

    @cached_property
    def hard_stops(self) -> np.ndarray:
        """bool: a sentence ends with this token."""
        return np.array([p != "" and p[-1] in HARD_STOPS for p in self._pieces])

    @cached_property
    def _marks(self) -> np.ndarray:
        """bool: the token ends with an exclamation or question mark, as NFKC writes the full-width ones."""
        return np.array([p.rstrip(CLOSERS)[-1:] in ("!", "?") for p in self._pieces])

    @cached_property
    def _ideographs(self) -> np.ndarray:
        """bool: the token begins with a Chinese or Japanese character, which no space precedes."""
        return np.array([_in(p[:1], "\u3040", "\u30ff") or _in(p[:1], "\u3400", "\u9fff") for p in self._pieces])

    @cached_property
    def _thai(self) -> tuple[np.ndarray, np.ndarray]:
        """bool: the token ends with a Thai character; it is a space, or begins with one before a Thai character."""
        thai = [(p, p.strip()) for p in self._pieces]
        ends = np.array([_in(p[-1:], "\u0e01", "\u0e5b") for p, _ in thai])
        return ends, np.array([p[:1] == " " and (not text or _in(text[0], "\u0e01", "\u0e5b")) for p, text in thai])

    def begins_sentence(self, last: np.ndarray, this: np.ndarray) -> np.ndarray:
        """Return a bool array: a sentence begins with token `this` if token `last` stands before it.

        A full stop, exclamation or question mark needs a space behind it, or a Chinese or Japanese character (after an
        exclamation or question mark). Thai writes a space between sentences and nowhere within words.
        """
        thai_ends, thai_begins = self._thai
        found = self.stops[last] & self.spaced[this] | self.hard_stops[last]
        return found | self._marks[last] & self._ideographs[this] | thai_ends[last] & thai_begins[this]


def _in(character: str, first: str, last: str) -> bool:
    return character != "" and first <= character <= last


def _of_word(character: str) -> bool:
    # a lone byte of a character decodes to the replacement character
    return character.isalnum() or character in "_\ufffd"
