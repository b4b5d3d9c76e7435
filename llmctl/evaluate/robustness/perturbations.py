"""Change texts at random: typos, swapped letters, case, synonyms, dropped words, padding, truncation and paraphrases.

A change has the form `change(text, options, rng) -> text`. If a change replaces single words, it chooses them at random
among the words to which it applies. The expected fraction of chosen words is the rate. All other characters stay.

Another package adds a change by the entry point `perturbation.NAME` of the group `llmctl`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from llmctl.config.registry import Registry

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['\u2019][^\W_]+)*")
"""Pattern of a word: letters and digits with inner apostrophes, or one Chinese or Japanese character."""
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
"""Rows of letters on a keyboard with the layout QWERTY. Each row is shifted by half a key against the row above."""


@dataclass(frozen=True)
class Options:
    """Store the arguments of a change other than the text."""

    rate: float = 0.2
    """Fraction of the words that are changed."""
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Map from a word in lower case to its synonyms, the closest first."""
    templates: Sequence[str] = ()
    """Paraphrases, in which `{{ text }}` stands for the text."""
    neutral: Sequence[str] = ()
    """Neutral sentences for padding."""


Change = Callable[[str, Options, Random], str]


def neighbours() -> dict[str, str]:
    """Return the letters next to each letter on the keyboard.

    Example:
        >>> neighbours()["a"], neighbours()["g"]
        ('sqwz', 'fhtyvb')
    """
    found = {}
    for r, row in enumerate(ROWS):
        for c, letter in enumerate(row):
            near = [row[max(c - 1, 0) : c], row[c + 1 : c + 2]]
            if r:
                near.append(ROWS[r - 1][c : c + 2])
            if r + 1 < len(ROWS):
                near.append(ROWS[r + 1][max(c - 1, 0) : c + 1])
            found[letter] = "".join(near)
    return found


NEIGHBOURS = neighbours()


def typos(text: str, options: Options, rng: Random) -> str:
    """Replace one letter of the chosen words by a neighbouring letter of the keyboard.

    The rate refers to words with three or more characters. The case of the letter is kept.
    """

    def places(word: str) -> list[int]:
        return [i for i, letter in enumerate(word) if letter.lower() in NEIGHBOURS]

    def change(word: str) -> str:
        i = rng.choice(places(word))
        letter = rng.choice(NEIGHBOURS[word[i].lower()])
        return word[:i] + (letter.upper() if word[i].isupper() else letter) + word[i + 1 :]

    return _changed(text, options.rate, rng, lambda word: len(word) > 2 and bool(places(word)), change)


def swaps(text: str, options: Options, rng: Random) -> str:
    """Swap two different neighbouring inner characters of the chosen words.

    The rate refers to words with four or more characters. The first and the last character stay in place.
    """

    def places(word: str) -> list[int]:
        return [i for i in range(1, len(word) - 2) if word[i] != word[i + 1] and word[i : i + 2].isalnum()]

    def change(word: str) -> str:
        i = rng.choice(places(word))
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    return _changed(text, options.rate, rng, lambda word: bool(places(word)), change)


def case(text: str, options: Options, rng: Random) -> str:
    """Write the chosen words in upper case, or in lower case if they are in upper case."""

    def change(word: str) -> str:
        return word.lower() if word.isupper() else word.upper()

    return _changed(text, options.rate, rng, lambda word: change(word) != word, change)


def synonyms(text: str, options: Options, rng: Random) -> str:
    """Replace the chosen words by a synonym. The rate refers to words that have synonyms."""
    known = options.synonyms
    return _changed(
        text, options.rate, rng, lambda word: word.lower() in known, lambda w: cased(rng.choice(known[w.lower()]), w)
    )


def cased(word: str, like: str) -> str:
    """Return the word in the letter case of the word `like`: capitalized, upper case, or unchanged.

    Example:
        >>> cased("big", "Large"), cased("big", "LARGE"), cased("big", "large")
        ('Big', 'BIG', 'big')
    """
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def drops(text: str, options: Options, rng: Random) -> str:
    """Remove the chosen words, each with the white space before it. At least one word is kept."""
    words = [match.span() for match in WORD.finditer(text)]
    chosen = _chosen(len(words), options.rate, rng)
    if words and len(chosen) == len(words):
        chosen.remove(rng.choice(chosen))
    for first, last in (words[i] for i in reversed(chosen)):
        before = text[:first].rstrip()
        text = before + text[last:] if before else text[last:].lstrip()
    return text


def padding(text: str, options: Options, rng: Random) -> str:
    """Add neutral sentences before or after the text.

    Sentences are added until the padding has at least `rate` times as many words as the text.
    """
    wanted, added, words = options.rate * len(WORD.findall(text)), [], 0
    while words < max(wanted, 1):
        added.append(rng.choice(options.neutral))
        words += max(len(WORD.findall(added[-1])), 1)
    return " ".join([*added, text] if rng.random() < 0.5 else [text, *added])


def truncation(text: str, options: Options, rng: Random) -> str:
    """Remove the end of the text: a fraction `rate` of the words, rounded down. At least one word is kept."""
    words = [match.end() for match in WORD.finditer(text)]
    kept = max(len(words) - int(options.rate * len(words) + 1e-9), 1)
    return text[: words[kept - 1]] if kept < len(words) else text


def paraphrase(text: str, options: Options, rng: Random) -> str:
    """Put the text into a random template, which does not change the text's meaning."""
    return rng.choice(options.templates).replace("{{ text }}", text)


PERTURBATIONS: Registry[Change] = Registry(
    "perturbation",
    {change.__name__: change for change in (typos, swaps, case, synonyms, drops, padding, truncation, paraphrase)},
)
"""Changes of texts by name."""


def changed(name: str, text: str, options: Options, seed: int) -> str:
    """Return the text after a change.

    The result depends only on the arguments, not on other texts.

    Example:
        >>> changed("truncation", "one two three four five", Options(rate=0.4), seed=0)
        'one two three'
    """
    return PERTURBATIONS[name](text, options, Random(f"{seed} {name} {text}"))


def _changed(text: str, rate: float, rng: Random, applies: Callable[[str], bool], change: Callable[[str], str]) -> str:
    """Return the text after `change` of a random fraction `rate` of the words for which `applies` is true."""
    words = [match.span() for match in WORD.finditer(text) if applies(match.group())]
    for first, last in (words[i] for i in reversed(_chosen(len(words), rate, rng))):
        text = text[:first] + change(text[first:last]) + text[last:]
    return text


def _chosen(count: int, rate: float, rng: Random) -> list[int]:
    """Sample a fraction `rate` of `count` indices, in ascending order.

    The number of indices is rounded up or down at random, so that its expectation is `rate * count`.
    """
    return sorted(rng.sample(range(count), min(int(rate * count + rng.random()), count)))
