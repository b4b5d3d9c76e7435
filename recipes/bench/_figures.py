"""Share code between benchmarks: the description of the machine, commands, and the output of figures."""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
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


def llmctl(*words: Any) -> str:
    """Run a command of llmctl in this process and return what it prints."""
    from llmctl.cli import app

    out = io.StringIO()
    with redirect_stdout(out):
        code = app.run([str(w) for w in words])
    if code:
        raise SystemExit(code)
    return out.getvalue()


def package(name: str) -> Path:
    """Return the folder of an installed package, whose code is not run."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name}: not installed; `make bench` installs it")
    return Path(spec.origin).parent
