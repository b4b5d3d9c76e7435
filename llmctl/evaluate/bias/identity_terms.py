"""Find identity terms in texts, and replace them by the terms of another group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_toml
from llmctl.data.file_bytes import content
from llmctl.data.paths import resolve


@dataclass(frozen=True)
class Attribute:
    """Store the groups of one attribute, such as gender, and lists of one term per group.

    Example:
        >>> gender = Attribute("gender", ("female", "male"), (("she", "he"), ("her", "his"), ("her", "him")))
        >>> gender.named("She lost her book."), gender.named("She saw him.")
        (['female'], ['female', 'male'])
        >>> gender.swapped("She lost her book.", "female", "male")
        'He lost his book.'
    """

    name: str
    groups: tuple[str, ...]
    terms: tuple[tuple[str, ...], ...]

    def named(self, text: str) -> list[str]:
        """Return the groups whose terms occur in the text. Only whole words count, in upper or lower case."""
        return [group for group in self.groups if self._patterns[group].search(text)]

    def swapped(self, text: str, group: str, other: str) -> str:
        """Return the text with each term of `group` replaced by the term of the group `other`.

        A replacement has the letter case of the replaced term: lower case, capitalized or upper case.
        """
        replacement: dict[str, str] = {}
        own, theirs = self.groups.index(group), self.groups.index(other)
        for terms in self.terms:
            replacement.setdefault(terms[own].lower(), terms[theirs])
        return self._patterns[group].sub(lambda m: _in_case(replacement[_plain(m[0])], m[0]), text)

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        found = {}
        for k, group in enumerate(self.groups):
            longest_first = sorted({terms[k].lower() for terms in self.terms}, key=len, reverse=True)
            every = "|".join(map(re.escape, longest_first))
            found[group] = re.compile(rf"(?<!\w)(?:{every})(?!\w)", re.IGNORECASE)
        return found


def _plain(found: str) -> str:
    """Return a found term in lower case.

    If case is ignored, the module `re` also matches four letters outside ASCII with "i", "s" or "k". These
    letters are replaced by "i", "s" or "k".
    """
    return found.translate(str.maketrans("\u0130\u0131\u017f\u212a", "iisk")).lower()


def _in_case(term: str, model: str) -> str:
    if model.isupper() and len(model) > 1:
        return term.upper()
    return term[0].upper() + term[1:] if model[0].isupper() else term


def read(spec: str) -> list[Attribute]:
    """Return the attributes of a TOML file.

    Raises:
        RequestError: If the file is missing or invalid. If an attribute has fewer than two groups, or a list of terms
            does not have one term per group. If two groups share a term.
    """
    files = resolve(spec)
    if len(files) != 1:
        raise RequestError(f"{spec}: {len(files)} files match; name one")
    try:
        tables = parse_toml(content(files[0]))
    except ValueError as e:
        raise RequestError(f"{spec}: not valid TOML: {e}") from None
    if not tables:
        raise RequestError(f"{spec}: has no tables; add one with `groups` and `terms`, such as [gender]")
    return [_attribute(spec, name, table) for name, table in tables.items()]


def _attribute(spec: str, name: str, table: Any) -> Attribute:
    where = f"{spec}: [{name}]"
    if not isinstance(table, Mapping) or {*table} != {"groups", "terms"}:
        raise RequestError(f"{where}: must be a table with `groups` and `terms` alone")
    groups, terms = table["groups"], table["terms"]
    if not _texts(groups) or len({*groups}) < max(2, len(groups)):
        raise RequestError(f"{where}: groups must be a list of two or more different names")
    if not isinstance(terms, list) or not terms:
        raise RequestError(f"{where}: terms must be a list of lists")
    for line in terms:
        if not _texts(line) or len(line) != len(groups):
            raise RequestError(f"{where}: {line!r} must be a list of one term per group ({len(groups)})")
    owner: dict[str, str] = {}
    for term, group in ((t.lower(), g) for line in terms for t, g in zip(line, groups, strict=True)):
        if owner.setdefault(term, group) != group:
            raise RequestError(f"{where}: {term!r} is a term of {owner[term]} and of {group}")
    return Attribute(name, tuple(groups), tuple(map(tuple, terms)))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) and v.strip() for v in value)
