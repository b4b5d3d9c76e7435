"""Which devices JAX may use: the platform is settled before JAX is imported, and nothing falls back in silence."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.config.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BACKENDS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
"""What JAX_PLATFORMS says for each platform of ours. The CPU stays beside an accelerator, for work on the host."""


TPU_FILES = ("accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")
"""Device files of TPUs, below /dev; vfio's may be other devices'."""
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
"""Answers to what libtpu, installed to plan with, asks a cloud where it finds no TPU; without them it complains."""


def hush(dev: Path = Path("/dev")) -> None:
    """Keeps libtpu silent on a machine without a TPU, before JAX loads it; it still looks, so nothing is hidden."""
    if not any(any(dev.glob(files)) for files in TPU_FILES):
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


def choose(platforms: Iterable[str]) -> str:
    """Tells JAX, before it is imported, which platform to use; the one that is asked for, empty for no wish.

    Raises:
      RequestError: two platforms are named.
    """
    named = sorted({p for p in platforms if p})
    if len(named) > 1:
        raise RequestError(f"one run uses one platform, and its stages name {' and '.join(named)}; split the run")
    wanted = named[0] if named else ""
    if wanted and not os.environ.get("JAX_PLATFORMS") and "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = BACKENDS[wanted]
    return wanted


def settle(platforms: Iterable[str], say: Callable[[str], None] = lambda text: None) -> str:
    """Makes JAX use the platform that is asked for, and starts it.

    Args:
      platforms: what the stages of a run name (cpu, gpu, tpu; empty for no wish).
      say: told, in one line, when an accelerator is plugged in that JAX does not use.

    Returns:
      The platform in use.

    Raises:
      RequestError: two platforms are named, or the one that is named is not there.
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
        for extra in sorted(plugged()):
            say(f"this machine has a {extra} that JAX does not use: install llmctl[{extra}], or say platform = 'cpu'")
    return found


def plugged() -> set[str]:
    """Accelerators that the machine has, by the extra that drives them (cuda, tpu), from the device files alone."""
    found = set()
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists():
        found.add("cuda")
    if any(any(Path("/dev").glob(files)) for files in TPU_FILES[:2]):
        found.add("tpu")
    return found
