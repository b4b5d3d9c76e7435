"""The timer on a clock that we wind ourselves."""

import pytest

from llmctl.evaluate.speed import Timing, interleave


class Clock:
    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def program(self, name, *costs):
        costs = iter(costs)

        def run():
            self.calls.append(name)
            self.now += next(costs)

        return run


def test_programs_take_turns_and_the_warm_up_is_not_counted():
    clock = Clock()
    got = interleave(
        {"a": clock.program("a", 9, 1, 2, 3), "b": clock.program("b", 9, 4, 4, 4)}, repeats=3, warmup=1, clock=clock
    )
    assert clock.calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert got["a"].seconds == (1, 2, 3) and got["b"].seconds == (4, 4, 4)


def test_percentiles_and_rates():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert timing.p50 == 3.0
    assert timing.p90 == pytest.approx(4.6)
    assert timing.rate(12) == 4.0


def test_a_measurement_needs_a_repeat():
    with pytest.raises(ValueError, match="repeats"):
        interleave({}, repeats=0)


def test_rounds_end_when_their_time_is_over_but_not_before_three():
    clock = Clock()
    got = interleave({"a": clock.program("a", 9, 2, 2, 2, 2, 2, 2)}, repeats=9, clock=clock, seconds=8)
    assert got["a"].seconds == (2, 2, 2, 2)
    got = interleave({"a": clock.program("a", 9, 5, 5, 5, 5)}, repeats=4, clock=clock, seconds=1)
    assert got["a"].seconds == (5, 5, 5)
