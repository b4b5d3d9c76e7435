"""Shared code of the benchmarks: description of the machine, and output of the figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any


def where(*packages: str) -> dict[str, Any]:
    """Return the machine and the package versions."""
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions}


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print one line per figure, or all figures as one JSON object."""
    if as_json:
        print(json.dumps(result))  # noqa: T201
        return
    for key, value in result.items():
        print(f"{key:26s} {value}")  # noqa: T201
