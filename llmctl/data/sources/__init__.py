"""Register data sources by name.

Each module of this folder defines the source with the module's name, in its variable `SOURCE`. Another package can add
a source by the entry point `source.NAME` of the group `llmctl`, which refers to a `llmctl.data.source.Reader`.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from llmctl.config.registry import Registry

SOURCES: Registry[Any] = Registry(
    "source", {found.name: f"{__name__}.{found.name}:SOURCE" for found in pkgutil.iter_modules(__path__)}
)
"""Readers by the value of the setting `data.source`. The type of the readers is Any, because an import of `Reader` here
would be circular."""
