"""Find texts that share an n-gram of words with a corpus.

Words are normalized as in GPT-3's analysis of contamination (Brown et al., 2020, arXiv:2005.14165, appendix C): without
case, punctuation and white space. In scripts without spaces, each character is a word. Unlike in that analysis, n-grams
that are frequent in the corpus count too.

Example:
    >>> find_shared(["The cat sat.", "A dog ran!"], ["where the CAT sat, it slept"], ngram=3, shortest=2)
    [Shared(document=0, words=('the', 'cat', 'sat')), None]

Shapes: T words of a part of the corpus, W windows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llmctl.evaluate.harm.word_list import UNSPACED

UNKNOWN = -1
"""Word number that stands for words of the corpus that no text contains, and for the gap between two documents."""
PART = 2**18
"""Number of words of the corpus that are searched at once."""
_WORD = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Shared(NamedTuple):
    """Store the first n-gram that a text shares with the corpus, and the number of the document that contains it."""

    document: int
    words: tuple[str, ...]


def words(text: str) -> list[str]:
    """Return the normalized words of a text.

    Example:
        >>> words("Don't STOP, 猫が…")
        ['don', 't', 'stop', '猫', 'が']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def sizes(texts: Iterable[str], ngram: int, shortest: int) -> list[int]:
    """Return the size of each text's n-grams: `ngram`, or the text's number of words if this is smaller.

    If a text has fewer words than `shortest`, it has no n-gram, and the size is 0.
    """
    counts = [len(words(text)) for text in texts]
    return [min(count, ngram) if count >= min(shortest, ngram) else 0 for count in counts]


def find_shared(texts: Sequence[str], corpus: Iterable[str], *, ngram: int, shortest: int) -> list[Shared | None]:
    """Return, for each text, the first n-gram that a document of the corpus contains; None if there is none.

    Args:
        texts: Texts to search for.
        corpus: Documents, which are read once.
        ngram: Number of words of an n-gram.
        shortest: Minimum number of words of a text with n-grams (see `sizes`).
    """
    found: list[Shared | None] = [None] * len(texts)
    number: dict[str, int] = {}
    owners: dict[int, dict[bytes, list[int]]] = {}  # size -> n-gram of word numbers -> texts
    for i, (text, size) in enumerate(zip(texts, sizes(texts, ngram, shortest), strict=True)):
        if size:
            ids = np.array([number.setdefault(word, len(number)) for word in words(text)], np.int32)
            for at in range(len(ids) - size + 1):
                owners.setdefault(size, {}).setdefault(ids[at : at + size].tobytes(), []).append(i)
    spelled = list(number)
    known = {
        size: np.unique(_hashes(np.frombuffer(b"".join(grams), np.int32).reshape(-1, size)))
        for size, grams in owners.items()
    }
    for ids_T, document_T in _parts(corpus, number):
        for size, grams in owners.items():
            if len(ids_T) < size:
                continue
            windows_WS = np.lib.stride_tricks.sliding_window_view(ids_T, size)
            for at in np.flatnonzero(np.isin(_hashes(windows_WS), known[size])):
                for i in grams.get(windows_WS[at].tobytes(), ()):  # equal hashes may be a collision
                    found[i] = found[i] or Shared(int(document_T[at]), tuple(spelled[n] for n in windows_WS[at]))
    return found


def _parts(corpus: Iterable[str], number: dict[str, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (word numbers [T], document index of each word [T]) for parts of the corpus of at least `PART` words.

    The word number `UNKNOWN` follows each document. The last part may be shorter.
    """
    ids, lengths, first = list[int](), list[int](), 0
    for document in corpus:
        before = len(ids)
        ids += [number.get(word, UNKNOWN) for word in words(document)]
        ids.append(UNKNOWN)
        lengths.append(len(ids) - before)
        if len(ids) >= PART:
            yield np.array(ids, np.int32), first + np.repeat(np.arange(len(lengths)), lengths)
            ids, first, lengths = [], first + len(lengths), []
    if ids:
        yield np.array(ids, np.int32), first + np.repeat(np.arange(len(lengths)), lengths)


def _hashes(ids_WS: np.ndarray) -> np.ndarray:
    """Return a polynomial hash modulo 2^64 of each window, [W]."""
    found_W = np.zeros(len(ids_WS), np.uint64)
    for column in range(ids_WS.shape[1]):
        found_W = found_W * _MULTIPLIER + (ids_WS[:, column].astype(np.int64) + 2).astype(np.uint64)
    return found_W
