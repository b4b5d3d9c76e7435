"""Data sources by name: each file of this folder is one, and its `SOURCE` opens it.

A package adds a source by the entry point `source.NAME` of the group `llmctl`; it names a `llmctl.data.source.Reader`.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from llmctl.config.registry import Registry

SOURCES: Registry[Any] = Registry(
    "source", {found.name: f"{__name__}.{found.name}:SOURCE" for found in pkgutil.iter_modules(__path__)}
)
"""Every value of `data.source` and its Reader; not typed as such, because readers are built on the settings."""
