"""What a training loop measures of itself: tokens a second, input wait, memory, and the share of the chip's peak."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from llmctl.distributed import hardware
from llmctl.distributed.mesh import Device

SIDE = 1536
"""Matrices multiplied to measure a CPU: large enough for full speed, a tenth of a second each on two cores."""


class Timer:
    """Tokens a second and the share of time spent waiting for input, between two log lines."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins a new interval."""
        self.start, self.wait, self.tokens, self.steps = time.monotonic(), 0.0, 0, 0

    def count(self, tokens: int) -> None:
        """One more step, of so many tokens."""
        self.tokens += tokens
        self.steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is input wait."""
        before = time.monotonic()
        yield
        self.wait += time.monotonic() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here is not counted (validation, checkpoints, compilation)."""
        before = time.monotonic()
        yield
        self.start += time.monotonic() - before

    def read(self, flops: float = 0.0, peak: float | None = None) -> dict[str, float]:
        """What happened since the last reading, nothing where no step did; read after the results are there.

        With `flops` a token and a `peak` of all devices (operations a second) also "mfu", the fraction of the peak that
        the model's own operations reach (arXiv:2204.02311, appendix B); padding and recomputation earn nothing.
        """
        if not self.steps:
            self.reset()
            return {}
        seconds = max(time.monotonic() - self.start, 1e-9)
        speed = self.tokens / seconds
        out = {
            "tokens_per_second": speed,
            "step_seconds": seconds / self.steps,
            "input_wait": self.wait / seconds,
        }
        if flops and peak:
            out["mfu"] = speed * flops / peak
        self.reset()
        return out


def peak(devices: list[Device], cache: Path) -> float | None:
    """Operations a second of all `devices` together at their best, or None for a chip that the table lacks.

    From the table for bfloat16; CPUs, which share the machine's cores however many they are, are measured once with a
    float32 matrix product, and the figure kept in the file `cache`.
    """
    if devices[0].platform != "cpu":
        one = hardware.of_kind(devices[0].device_kind)
        return one and one.peak("bfloat16") * len(devices)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(cache.read_text(encoding="utf-8"))["flops_per_second"])
    found = measure(SIDE)
    cache.write_text(json.dumps({"flops_per_second": found}), encoding="utf-8")
    return found


def measure(side: int) -> float:
    """Operations a second of the fastest of a few float32 matrix products [side, side] on one device."""
    x = jnp.ones((side, side))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return 2 * side**3 / best


def memory(devices: list[Device]) -> dict[str, float]:
    """{"memory_gib": the most that the fullest of these devices has held}; on the CPU, what the process has held."""
    stats = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if not peaks and devices[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]
    return {"memory_gib": max(peaks) / 2**30} if peaks else {}
