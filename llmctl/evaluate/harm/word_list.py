"""Find the words and phrases of a list in texts, in spite of case, accents and simple obfuscation.

A list is a UTF-8 file with one word or phrase per line. Blank lines and lines that begin with # are ignored.

Text and list are normalized in the same way: Unicode NFKD, case folding, no diacritics and no invisible characters. An
entry matches only whole words, so "ass" does not match "class". Inflections are other words. These obfuscations match:

- look-alike characters: digits, symbols, and Greek and Cyrillic letters, as in "d4rn". At least one character must be a
  letter of the entry itself, so that numbers do not match;
- a letter that is repeated three times or more, as in "daaarn";
- asterisks inside a word of at least four letters, as in "d**n";
- the same separator between all letters of a word, as in "d.a.r.n" or "d a r n". The word must have at least three
  letters.

In scripts without spaces between words, such as Chinese, an entry also matches inside other words.

Example:
    >>> words = WordList(["darn"])
    >>> [text for text in ("DÀRN!", "d4rn", "d-a-r-n", "d**n", "darning") if words.find(text)]
    ['DÀRN!', 'd4rn', 'd-a-r-n', 'd**n']
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from llmctl.config.errors import RequestError

REDACTED = "[redacted]"
"""Text that replaces a found word."""
LOOKALIKES = {
    "a": "4@\u0430\u03b1",
    "b": "8\u03b2",
    "c": "\u0441\u03f2",
    "d": "\u0501",
    "e": "3\u20ac\u0435\u03b5",
    "g": "9",
    "h": "\u04bb",
    "i": "1!|\u0456\u03b9",
    "j": "\u0458",
    "k": "\u043a\u03ba",
    "l": "1!|",
    "m": "\u043c",
    "n": "\u03b7",
    "o": "0\u043e\u03bf",
    "p": "\u0440\u03c1",
    "s": "5$\u0455",
    "t": "7+\u0442\u03c4",
    "u": "\u03c5",
    "v": "\u03bd",
    "w": "\u0461",
    "x": "\u0445\u03c7",
    "y": "\u0443\u03b3",
    "z": "2",
}
"""Characters that look like a Latin letter, after normalization."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
"""Ranges of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""
MARKED = "\u0900-\u0963\u0966-\u0dff"
"""Indic scripts, whose vowel signs are part of a word but are not letters for the module `re`."""
_BEFORE, _AFTER = rf"(?<![^\W_])(?<![{MARKED}])", rf"(?![^\W_]|[{MARKED}])"
_ALONE = re.compile(f"[{UNSPACED}]")
_STARTS = re.compile(rf"[{UNSPACED}]|{_BEFORE}\S")


class Match(NamedTuple):
    """Store the range [first, last) of a match in a text, and the matched entry as written in the list."""

    start: int
    end: int
    entry: str


class WordList:
    """Find the entries of a list in texts."""

    def __init__(self, entries: Sequence[str]) -> None:
        """Compile one regular expression per entry.

        Raises:
            ValueError: If an entry has no letter and no digit.
        """
        self._patterns: dict[str, list[tuple[str, frozenset[str], re.Pattern[str]]]] = {}
        for entry in dict.fromkeys(entries):
            folded = _fold(entry)[0]
            if not any(c.isalnum() for c in folded):
                raise ValueError(f"{entry!r} has no letter")
            pattern = re.compile(_pattern(folded))
            first = folded.split()[0][0]
            for start in (first, *LOOKALIKES.get(first, "")):
                self._patterns.setdefault(start, []).append((entry, frozenset(folded), pattern))

    def find(self, text: str) -> list[Match]:
        """Return the matches in a text, in order and without overlap.

        If several entries match at the same position, the longest match counts.
        """
        folded, offset = _fold(text)
        found, end = list[Match](), 0
        for at in (m.start() for m in _STARTS.finditer(folded)):
            if at < end:
                continue
            matches = [
                (m.end(), entry)
                for entry, own, pattern in self._patterns.get(folded[at], ())
                if (m := pattern.match(folded, at)) and not own.isdisjoint(m[0])
            ]
            if matches:
                end, entry = max(matches, key=lambda pair: pair[0])
                found.append(Match(offset[at], offset[end], entry))
        return found

    def redact(self, text: str) -> str:
        """Return the text with `REDACTED` in place of each match.

        Example:
            >>> WordList(["darn"]).redact("Oh d4rn it")
            'Oh [redacted] it'
        """
        parts, end = [], 0
        for match in self.find(text):
            parts += [text[end : match.start], REDACTED]
            end = match.end
        return "".join([*parts, text[end:]])


def read(spec: str, where: str) -> WordList:
    """Read a list from a file.

    Args:
        spec: Path, or `pkg:NAME/path` for a file inside an installed Python package.
        where: Name of the setting, for error messages.

    Raises:
        RequestError: If the file is missing, is not UTF-8 text, has no entry, or has an entry without letters.
    """
    from llmctl.data import file_bytes, paths

    try:
        files = paths.resolve(spec)
    except RequestError as e:
        raise RequestError(f"{where}: {e}") from None
    entries = list[str]()
    for file in files:
        for number, line in file_bytes.lines(file):
            entry = " ".join(line.split())
            if not entry or entry.startswith("#"):
                continue
            if not any(c.isalnum() for c in _fold(entry)[0]):
                raise RequestError(f"{where}: {file}:{number}: {entry!r} has no letter; write a word or a phrase")
            entries.append(entry)
    if not entries:
        raise RequestError(f"{where}: {spec} has no words; write one word or phrase per line")
    return WordList(entries)


def _fold(text: str) -> tuple[str, list[int]]:
    """Return the normalized text, and the index in `text` of each of its characters and of its end."""
    out, offset = list[str](), list[int]()
    for i, c in enumerate(text):
        for part in unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", c).casefold()):
            # The diacritics of Latin, Greek and Cyrillic. Marks of other scripts change words.
            if "\u0300" <= part <= "\u036f" or unicodedata.category(part) == "Cf":
                continue
            out.append(part)
            offset.append(i)
    return "".join(out), [*offset, len(text)]


def _pattern(folded: str) -> str:
    """Return a regular expression for a normalized entry. The expression is matched at the start of a word."""
    words, groups = folded.split(), itertools.count(1)
    whole = r"[\W_]+".join(_word(word, groups) for word in words)
    return (_BEFORE if not _ALONE.match(words[0]) else "") + whole + (_AFTER if not _ALONE.match(words[-1][-1]) else "")


def _word(word: str, groups: itertools.count[int]) -> str:
    """Return a regular expression for one word. `groups` yields the numbers of the expression's groups."""
    last, parts, at = len(word) - 1, list[str](), 0
    for letter, run in itertools.groupby(word):
        count = len(list(run))
        masked = "*" if len(word) >= 4 and at > 0 and at + count <= last else ""
        one, group = f"[{re.escape(letter + LOOKALIKES.get(letter, '') + masked)}]", next(groups)
        # A run of the entry's length, or of three or more: English words differ by double letters ("as", "ass").
        more = rf"(?:\{group}\{group}+)?" if count == 1 else rf"\{group}*"
        # Atomic, because "1" is both i and l: with backtracking, the time would grow exponentially with their number.
        parts.append(f"(?>{one}{{{count - 1}}}({one}){more})")
        at += count
    if len(word) < 3 or _ALONE.search(word):
        return f"(?:{''.join(parts)})"
    letters, separator = [f"[{re.escape(c + LOOKALIKES.get(c, ''))}]" for c in word], rf"\{next(groups)}"
    spread = rf"{letters[0]}([\W_]{{1,2}}){separator.join(letters[1:])}"
    return f"(?:{''.join(parts)}|{spread})"
