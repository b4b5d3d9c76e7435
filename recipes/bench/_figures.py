"""What the benchmarks share: where they ran, and how they print what they found."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any


def where(*packages: str) -> dict[str, Any]:
    """The machine and the versions that figures belong to."""
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions}


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """A line a figure, or all of them as one JSON object."""
    if as_json:
        print(json.dumps(result))  # noqa: T201
        return
    for key, value in result.items():
        print(f"{key:26s} {value}")  # noqa: T201
