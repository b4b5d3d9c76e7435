"""The choice of one format per matrix, against all combinations."""

import itertools

import numpy as np
import pytest

from llmctl.compress.quantization.format_allocation import (
    Mixture,
    Option,
    best_within,
    pareto_front,
    smallest_within,
)


def drawn(seed, matrices, formats, sizes):
    """Return random options; a format with more bits does not always increase the loss less."""
    rng = np.random.default_rng(seed)
    return [
        [Option(f"f{i}", int(size * (i + 2)), float(max(0.0, rng.normal(1 / (i + 1), 0.3)))) for i in range(formats)]
        for size in rng.choice(sizes, matrices)
    ]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("sizes", [[100], [100, 300], [101, 257, 64, 999, 7]], ids=str)
def test_the_front_is_that_of_all_combinations(seed, sizes):
    """Also for the budget between any two neighbours, and with matrices that have a single format."""
    options = drawn(seed, 6, 3, sizes)
    options[seed % 6] = options[seed % 6][1:2]
    everything = [
        (sum(o.bits for o in chosen), sum(o.increase for o in chosen)) for chosen in itertools.product(*options)
    ]
    front = pareto_front(options)
    by_name = [{o.format: o for o in own} for own in options]
    for mixture in front:
        chosen = [own[name] for own, name in zip(by_name, mixture.formats, strict=True)]
        assert mixture.bits == sum(o.bits for o in chosen)
        assert mixture.increase == pytest.approx(sum(o.increase for o in chosen))
    for bits in sorted({bits for bits, _ in everything}):
        best = min(increase for other, increase in everything if other <= bits)
        found = best_within(front, bits)
        assert found and found.bits <= bits and found.increase == pytest.approx(best, abs=1e-12)
    assert best_within(front, min(everything)[0] - 1) is None
    assert np.all(np.diff([m.bits for m in front]) > 0) and np.all(np.diff([m.increase for m in front]) < 0)


def test_infinite_increases_come_only_where_nothing_else_is_as_small():
    options = [[Option("a", 1, np.inf), Option("b", 2, 0.5)], [Option("a", 1, 0.25), Option("b", 2, 0.0)]]
    assert [m.formats for m in pareto_front(options)] == [("a", "a"), ("b", "a"), ("b", "b")]


def test_the_smallest_within_a_limit_was_measured():
    front = [Mixture((str(i),), i, 10.0 - i) for i in range(10)]
    for limit in (0.0, 0.5, 3.0, 4.2, 11.0):
        calls = []

        def measure(mixture, calls=calls):
            calls.append(mixture)
            return 2 * mixture.increase - 2  # 18 to 0

        found, value = smallest_within(front, limit, measure)
        assert found == min((m for m in front if 2 * m.increase - 2 <= limit), key=lambda m: m.bits)
        assert found in calls and value == 2 * found.increase - 2 and len(calls) <= 5
    assert smallest_within(front, -1.0, lambda m: 0.5) == (None, 0.5)
    assert smallest_within(front, 1.0, lambda m: float("nan"))[0] is None
