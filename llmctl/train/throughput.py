"""Measure the training loop: tokens per second, time spent waiting for input, memory, and model FLOPs utilization."""

from __future__ import annotations

import contextlib
import functools
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
"""Number of rows and columns of the matrices that are multiplied to measure the speed of a CPU. A product of this size
reaches full speed, and takes 0.1 s on two cores.
"""


class Timer:
    """Measure tokens per second and the fraction of time spent waiting for input, between two log lines.

    Example:
        timer = Timer()
        timer.tokens, timer.steps = timer.tokens + 4096, timer.steps + 1  # after each step
        metrics = timer.read(waited=batches.wait_seconds)
    """

    def __init__(self) -> None:
        self.waited = self.fastest = 0.0
        self.reset()

    def reset(self) -> None:
        """Start a new measurement interval."""
        self.start, self.tokens, self.steps = time.monotonic(), 0, 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside this context from the measurement, such as the time of a validation."""
        before = time.monotonic()
        yield
        self.start += time.monotonic() - before

    def read(self, waited: float, flops: float = 0.0, peak: float | None = None) -> dict[str, float]:
        """Return the metrics of the interval by name, and start a new interval. Without steps the dictionary is empty.

        Call this method when the results of the last step are on the host, because steps are dispatched asynchronously.

        Args:
          waited: seconds spent waiting for input since training began.
          flops: floating-point operations per token.
          peak: peak performance of all devices together, in operations per second. If `peak` is given, the result
            contains "mfu": the model's operations per second, as a fraction of the peak (Chowdhery et al., 2022,
            arXiv:2204.02311, appendix B). Operations on padding and recomputation do not count. The peak measured on a
            busy CPU is too low. If the model was faster than `peak` in any interval, the model's highest speed
            therefore replaces `peak`.
        """
        wait, self.waited = waited - self.waited, waited
        if not self.steps:
            self.reset()
            return {}
        seconds = max(time.monotonic() - self.start, 1e-9)
        speed = self.tokens / seconds
        out = {"tokens_per_second": speed, "step_seconds": seconds / self.steps, "input_wait": wait / seconds}
        if flops and peak:
            self.fastest = max(self.fastest, speed * flops)
            out["mfu"] = speed * flops / max(peak, self.fastest)
        self.reset()
        return out


def peak(devices: list[Device], cache: Path) -> float | None:
    """Return the peak performance of all `devices` together, in operations per second. If the chip is unknown, return
    None.

    For accelerators, the peak is the bfloat16 figure in `llmctl`'s table of hardware. For CPUs, the speed of a float32
    matrix product is measured once and stored in the file `cache`. The number of CPU devices does not matter, because
    the devices share the cores of the machine.
    """
    if devices[0].platform != "cpu":
        one = hardware.of_kind(devices[0].device_kind)
        return one and one.peak("bfloat16") * len(devices)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(cache.read_text(encoding="utf-8"))["flops_per_second"])
    found = measure(SIDE)
    cache.write_text(json.dumps({"flops_per_second": found}), encoding="utf-8")
    return found


@functools.cache
def measure(side: int) -> float:
    """Return the operations per second of the fastest of five float32 matrix products [side, side] on one device.

    Each process measures only once. A run may have many training stages, and a measurement takes half a CPU second.
    """
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
    """Return {"memory_gib": peak memory in GiB}. If the devices report no memory, the result is empty.

    The peak is the largest among this process's devices. On a CPU, the result is the peak of the process.
    """
    stats = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if not peaks and devices[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]
    return {"memory_gib": max(peaks) / 2**30} if peaks else {}
