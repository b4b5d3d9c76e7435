"""Time several programs in alternation, so that noise of the machine affects all of them equally.

The programs run round-robin (A B C A B C …) in one process. If another process uses the machine for a short time, a few
rounds of all programs are slow. The median ignores such rounds. Compilation happens in the warm-up.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

LEAST_ROUNDS = 3
"""Minimum number of timed rounds before timing may end early (see `interleave`)."""


@dataclass(frozen=True)
class Timing:
    """Store the measured times of a program in seconds, one per round."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        """Return the median time in seconds."""
        return float(np.percentile(self.seconds, 50))

    @property
    def p90(self) -> float:
        """Return the 90th percentile of the time in seconds."""
        return float(np.percentile(self.seconds, 90))

    def rate(self, units: float) -> float:
        """Return the throughput per second at the median time, if one call processes `units` items, such as tokens."""
        return units / self.p50


def interleave(
    programs: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Time `repeats` rounds of all programs, after `warmup` rounds that are not timed, and return the timings by name.

    A program must block until its work is done (`jax.block_until_ready` for JAX programs). Timing ends early if the
    timed rounds have taken `seconds`, but not before `LEAST_ROUNDS` rounds.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats ({repeats}) must be positive and warmup ({warmup}) not negative")
    for _ in range(warmup):
        for program in programs.values():
            program()
    taken: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    begun = clock()
    for round_ in range(repeats):
        if round_ >= LEAST_ROUNDS and clock() - begun >= seconds:
            break
        # Alternate the direction, so that no program always runs after the same one, which may have evicted its cache
        # lines.
        for name in names if round_ % 2 == 0 else reversed(names):
            start = clock()
            programs[name]()
            taken[name].append(clock() - start)
    return {name: Timing(tuple(each)) for name, each in taken.items()}
