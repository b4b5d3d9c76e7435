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
"""Readers by name, which is the value of `data.source`. Their type is Any here, because the module of `Reader` imports
the settings, which import this module."""
