"""Registries: named things that llmctl and other packages provide, imported when they are first used.

Another package adds a thing by an entry point of the group `llmctl`, whose name is KIND.NAME:

    [project.entry-points."llmctl"]
    "source.arrow" = "my_package.arrow:read"

Our own things are written the same way, `module:attribute`, in the table that each registry starts with.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Generic, TypeVar

from llmctl.config.base import hint
from llmctl.config.errors import RequestError

GROUP = "llmctl"
T = TypeVar("T")


@functools.cache
def entry_points() -> dict[str, metadata.EntryPoint]:
    """Return the entry points of the group by name, those of all installed packages."""
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


@dataclass(frozen=True)
class Choices:
    """Names that help and completion list for a setting, if they are not those of one registry."""

    names: Callable[[], list[str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


class Registry(Generic[T]):
    """Entries of one kind by name: those of llmctl, which cannot be replaced, then those of installed packages.

    Args:
      kind: kind of the entries, such as `source`; the first part of an entry point's name.
      own: entries of llmctl itself by name: "module:attribute", or the object if its import needs no JAX (a record).
    """

    def __init__(self, kind: str, own: Mapping[str, str | T]) -> None:
        self.kind, self.own = kind, own

    def names(self) -> list[str]:
        """Return every name, ours first in the order of the table, then the others sorted. Nothing is imported."""
        start = f"{self.kind}."
        return [
            *self.own,
            *sorted({n.removeprefix(start) for n in entry_points() if n.startswith(start)} - {*self.own}),
        ]

    def __contains__(self, name: object) -> bool:
        return name in self.own or f"{self.kind}.{name}" in entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> T:
        """Import and return the thing called `name`.

        Raises:
          RequestError: there is none of this name, or the package that provides it cannot be imported.
        """
        if name in self.own:
            own = self.own[name]
            if not isinstance(own, str):
                return own
            module, _, attribute = own.partition(":")
            return getattr(importlib.import_module(module), attribute)
        try:
            self.check(name)
        except ValueError as e:
            raise RequestError(str(e)) from None
        point = entry_points()[f"{self.kind}.{name}"]
        try:
            return point.load()
        except (ImportError, AttributeError) as e:
            package = point.dist.name if point.dist else "an installed package"
            raise RequestError(f"{self.kind} {name!r} of {package} cannot be loaded: {e}") from e

    def check(self, name: str) -> str:
        """Return `name` if it is known; for pydantic's `AfterValidator`.

        Raises:
          ValueError: it is not; one line with a near match.
        """
        if name not in self:
            known = self.names()
            raise ValueError(f"unknown {self.kind} {name!r}{hint(name, known)}; known: {', '.join(known)}")
        return name
