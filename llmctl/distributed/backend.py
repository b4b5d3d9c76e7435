"""Select the JAX platform before JAX is imported, and fail if the requested platform is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.config.errors import RequestError
from llmctl.distributed import host_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BACKENDS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
"""Value of JAX_PLATFORMS for each platform. Accelerators also list cpu, because some work runs on the host."""


TPU_FILES = ("accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")
"""Glob patterns of TPU device files below /dev. Files below vfio may belong to other devices."""
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
"""Environment variables to set on a machine without a TPU. If they are not set, libtpu queries a cloud metadata server
for the type of the TPU, and logs errors."""


def silence_libtpu(dev: Path = Path("/dev")) -> None:
    """Prevent error logs of libtpu on a machine without a TPU. Call this before JAX loads libtpu.

    libtpu still searches for TPUs itself. libtpu therefore also finds a TPU that this function overlooks.

    Args:
        dev: Folder of the device files.
    """
    if not any(any(dev.glob(files)) for files in TPU_FILES):
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


def share_arena() -> None:
    """Let all threads share one allocator arena if JAX will use CPUs. Call this before JAX starts threads.

    Programs on CPUs allocate their temporary memory in threads of JAX (see `llmctl.distributed.host_memory`).
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not attached_accelerators():
        host_memory.share_arena()


def choose(platforms: Iterable[str]) -> str:
    """Set JAX_PLATFORMS to the requested platform, if JAX is not imported yet.

    Args:
        platforms: Requested platforms (cpu, gpu, tpu); an empty string requests none.

    Returns:
        The requested platform, or an empty string.

    Raises:
        RequestError: If two different platforms are requested.
    """
    named = sorted({p for p in platforms if p})
    if len(named) > 1:
        raise RequestError(f"one run uses one platform, and its stages name {' and '.join(named)}; split the run")
    wanted = named[0] if named else ""
    if wanted and not os.environ.get("JAX_PLATFORMS") and "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = BACKENDS[wanted]
    return wanted


def initialize(platforms: Iterable[str], warn: Callable[[str], None] = lambda text: None) -> str:
    """Initialize the requested JAX backend, and check that its devices exist.

    Args:
        platforms: Requested platforms (cpu, gpu, tpu); an empty string requests none.
        warn: Function that is called with one line if the machine has an accelerator that JAX does not use.

    Returns:
        The platform in use.

    Raises:
        RequestError: If two different platforms are requested, or if the requested platform is missing.
    """
    forced = os.environ.get("JAX_PLATFORMS", "")
    wanted = choose(platforms)
    import jax

    try:
        found = jax.default_backend()
    except RuntimeError as e:
        text = str(e).splitlines()[0]
        raise RequestError(f"platform {wanted or forced!r}: JAX finds none here: {text}") from None
    if wanted and found != wanted:
        why = f", for JAX_PLATFORMS={forced} is set" if forced else ""
        raise RequestError(f"platform {wanted!r} is asked for and JAX finds only {found!r}{why}; try llmctl doctor")
    if not wanted and found == "cpu" and not forced:
        for extra in sorted(attached_accelerators()):
            warn(f"this machine has a {extra} that JAX does not use: install llmctl[{extra}], or say platform = 'cpu'")
    return found


def attached_accelerators() -> set[str]:
    """Return the accelerators of this machine, as names of pip extras (cuda, tpu).

    The function only looks for device files, so no driver is loaded.
    """
    found = set()
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists():
        found.add("cuda")
    if any(any(Path("/dev").glob(files)) for files in TPU_FILES[:2]):
        found.add("tpu")
    return found
