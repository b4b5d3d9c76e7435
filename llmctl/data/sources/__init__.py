"""Register data sources by name: the module `NAME` of this folder defines the source NAME in its variable `SOURCE`.

A package adds a source by the entry point `source.NAME` of the group `llmctl`, which refers to a
`llmctl.data.source.Reader`.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from llmctl.config.registry import Registry

SOURCES: Registry[Any] = Registry(
    "source", {found.name: f"{__name__}.{found.name}:SOURCE" for found in pkgutil.iter_modules(__path__)}
)
"""Readers by the value of `data.source`. The type is Any, because the class Reader depends on the settings."""
