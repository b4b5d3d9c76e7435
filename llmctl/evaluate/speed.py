"""Latency and throughput of several programs, measured so that their ratios are fair on a noisy machine.

The programs run in turn (A B C A B C …) in one process: a neighbour that steals the processor for a while slows one
round of all of them, not every repeat of one. Medians then drop such rounds. Compilation happens in the warm-up.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds a call took, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        """Median seconds."""
        return float(np.percentile(self.seconds, 50))

    @property
    def p90(self) -> float:
        """Seconds that nine calls in ten stay below."""
        return float(np.percentile(self.seconds, 90))

    def rate(self, units: float) -> float:
        """Units a second at the median, for a call that handles `units` of them."""
        return units / self.p50


def interleave(
    programs: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every program `repeats` times, round-robin, after `warmup` unmeasured rounds.

    A program must not return before its work is done (`jax.block_until_ready` for JAX programs).
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats ({repeats}) must be positive and warmup ({warmup}) not negative")
    for _ in range(warmup):
        for program in programs.values():
            program()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for round_ in range(repeats):
        # Alternate the direction, so that nobody always runs after the same (possibly cache-hungry) neighbour.
        for name in names if round_ % 2 == 0 else reversed(names):
            start = clock()
            programs[name]()
            seconds[name].append(clock() - start)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}
