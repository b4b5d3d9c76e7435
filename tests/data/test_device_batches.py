"""Batches: which rows they hold, going on where one stopped, threads that end, failures that surface."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmctl.config.errors import RequestError
from llmctl.data.device_batches import local_spans, prefetch


class Numbers:
    """Row i is [i]."""

    def __init__(self, n, bad=None):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def batch(self, rows_B):
        if self.bad is not None and self.bad in rows_B:
            raise RequestError(f"row {self.bad} is bad")
        return {"tokens": rows_B[:, None].astype(np.int32), "weights": np.ones((len(rows_B), 1), np.float32)}


def taken(found):
    return {step: batch["tokens"][:, 0].tolist() for step, batch in found}


def test_step_k_holds_rows_k_b_and_on():
    with prefetch(Numbers(5), 3, stop=4) as found:
        assert taken(found) == {0: [0, 1, 2], 1: [3, 4, 5], 2: [6, 7, 8], 3: [9, 10, 11]}
        assert found.wait_seconds > 0


def test_resuming_gives_what_would_have_followed():
    with prefetch(Numbers(5), 4, stop=20) as found:
        whole = taken(found)
    with prefetch(Numbers(5), 4) as first:
        seen = taken(next(first) for _ in range(7))
    with prefetch(Numbers(5), 4, start=7, stop=20) as second:
        assert seen | taken(second) == whole
    with prefetch(Numbers(5), 4, start=9, stop=7) as none:
        assert taken(none) == {}


def test_processes_build_their_own_rows():
    with prefetch(Numbers(9), 6, stop=2, spans=[(0, 1), (4, 6)]) as found:
        assert taken(found) == {0: [0, 4, 5], 1: [6, 10, 11]}


def test_stopping_on_two_processes_and_going_on_with_one_or_four():
    def run(processes, start, stop):
        share = 8 // processes
        each = []
        for p in range(processes):
            with prefetch(Numbers(9), 8, start, stop, spans=[(p * share, (p + 1) * share)]) as found:
                each.append(taken(found))
        return {step: [row for process in each for row in process[step]] for step in each[0]}

    whole = run(1, 0, 9)
    assert whole == {k: list(range(8 * k, 8 * k + 8)) for k in range(9)}
    for processes in (1, 2, 4):
        assert run(2, 0, 5) | run(processes, 5, 9) == whole


def test_local_spans_are_the_rows_of_the_addressable_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    assert local_spans(NamedSharding(mesh, PartitionSpec("data")), 8) == [(0, 8)]

    class TwoOfFour:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(2, 4),), 1: (slice(2, 4),), 2: (slice(6, None),)}

    assert local_spans(TwoOfFour(), 8) == [(2, 4), (6, 8)]


def test_place_runs_on_every_batch():
    with prefetch(Numbers(4), 2, stop=3, place=lambda b: {"tokens": -b["tokens"]}) as found:
        assert taken(found)[2] == [-4, -5]


def test_a_failure_surfaces_at_its_step():
    with prefetch(Numbers(100, bad=10), 4) as found:
        assert next(found)[0] == 0
        assert next(found)[0] == 1
        with pytest.raises(RequestError, match=r"row 10 is bad"):
            next(found)


def prefetching():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def test_threads_end_when_the_consumer_stops_early():
    with prefetch(Numbers(4), 2) as found:
        next(found)
        threads = prefetching()
        assert threads
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match=r"closed"):
        next(found)
    dropped = prefetch(Numbers(4), 2)
    next(dropped)
    threads = prefetching()
    del dropped
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_evaluation_covers_each_row_once():
    with prefetch(Numbers(7), 3, once=True) as found:
        last = {}
        rows = []
        for _, last in found:
            rows += last["tokens"][last["row_weight"] == 1, 0].tolist()
    assert rows == list(range(7))
    assert last["tokens"][:, 0].tolist() == [6, 6, 6]
    assert last["row_weight"].tolist() == last["weights"][:, 0].tolist() == [1, 0, 0]
    with prefetch(Numbers(7), 3, stop=1, once=True) as found:
        assert len(taken(found)) == 1
