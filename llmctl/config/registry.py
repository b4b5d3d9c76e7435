"""Register objects by name, from llmctl and from other packages. Each object is imported when it is first used.

Another package adds an object by an entry point of the group `llmctl`, whose name is KIND.NAME:

    [project.entry-points."llmctl"]
    "source.arrow" = "my_package.arrow:read"

llmctl's own objects are arguments of the `Registry`, in the same form `module:attribute`.
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
    """Return the entry points of the group `llmctl` of all installed packages, by name."""
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


@dataclass(frozen=True)
class Choices:
    """Compute the allowed values of a setting, for help and shell completion.

    Use this class if the values are names from several registries, or do not come from a registry. For the names of one
    `Registry`, use the registry itself.
    """

    names: Callable[[], list[str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


class Registry(Generic[T]):
    """Map names to objects of one kind. Other packages can add objects, but cannot replace llmctl's objects.

    Args:
        kind: Kind of the objects, such as `source`; the first part of an entry point's name.
        own: llmctl's own objects by name: "module:attribute", or the object itself if its import does not need JAX.
    """

    def __init__(self, kind: str, own: Mapping[str, str | T]) -> None:
        self.kind, self.own = kind, own

    def names(self) -> list[str]:
        """Return all names: first llmctl's names in their given order, then other packages' names in alphabetical
        order.

        No object is imported.
        """
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
        """Import and return the object called `name`.

        Raises:
            RequestError: If the name is unknown, or if the package that provides it cannot be imported.
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
        """Check that `name` is known, and return `name`. Use this function with pydantic's `AfterValidator`.

        Raises:
            ValueError: If the name is unknown. The one-line message suggests a similar name.
        """
        if name not in self:
            known = self.names()
            raise ValueError(f"unknown {self.kind} {name!r}{hint(name, known)}; known: {', '.join(known)}")
        return name
