"""How held-out documents become scored windows: each token is predicted exactly once, whatever the stride.

A document is `prefix + tokens`. A window holds at most `context` of those as inputs; the first window of a document
scores all it holds, each later one starts so that `stride` new tokens fit and scores only those, with the rest as
context. Windows of several documents share a row as separate segments, which attention keeps apart, so packing
changes the cost and never the score.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Documents(Protocol):
    """Token ids of document d by number: a list of lists, or a Corpus."""

    def __len__(self) -> int: ...

    def __getitem__(self, d: int, /) -> Sequence[int] | np.ndarray: ...


class Window(NamedTuple):
    """Inputs [begin, end) of document `document`; targets of the inputs from `fresh` on are scored."""

    document: int
    begin: int
    fresh: int
    end: int


def slide(document: int, inputs: int, context: int, stride: int) -> Iterable[Window]:
    """Windows over a document of `inputs` predicted tokens.

    Raises ValueError unless 1 <= stride <= context: a longer stride would leave tokens unscored.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride ({stride}) must be between 1 and the context ({context})")
    fresh = 0
    while fresh < inputs:
        end = min(inputs, fresh + (stride if fresh else context))
        yield Window(document, max(0, end - context), fresh, end)
        fresh = end


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers, none above `capacity`: best fit, longest first (deterministic)."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] > capacity:
            raise ValueError(f"item of {lengths[item]} does not fit a bin of {capacity}")
        at = bisect_left(room, (lengths[item], -1))
        if at < len(room):
            free, where = room.pop(at)
        else:
            free, where = capacity, len(bins)
            bins.append([])
        bins[where].append(item)
        insort(room, (free - lengths[item], where))
    return bins


def rows(
    documents: Documents, prefix: int | None, context: int, stride: int, given: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """LM rows [N, context] (tokens, targets, weights, segments, positions) that score every document once.

    `prefix` (the BOS token) conditions the first token; without one the first token of a document cannot be scored.
    Of document d the first `given[d]` tokens are context alone (a prompt).
    """
    start = np.array([] if prefix is None else [prefix], np.int32)
    sequences = [np.concatenate([start, np.asarray(documents[d], np.int32)]) for d in range(len(documents))]
    windows = [w for d, s in enumerate(sequences) for w in slide(d, len(s) - 1, context, stride)]
    bins = pack([w.end - w.begin for w in windows], context)
    shape = (len(bins), context)
    names = ("tokens", "targets", "weights", "segments", "positions")
    out: dict[str, np.ndarray] = {n: np.zeros(shape, np.float32 if n == "weights" else np.int32) for n in names}
    for row, members in enumerate(bins):
        at = 0
        for segment, member in enumerate(members, 1):
            document, begin, fresh, end = windows[member]
            if given is not None:  # input i predicts entry i + 1 of the sequence, whose first entry is the prefix
                fresh = min(max(fresh, given[document] + len(start) - 1), end)
            here = slice(at, at + end - begin)
            out["tokens"][row, here] = sequences[document][begin:end]
            out["targets"][row, here] = sequences[document][begin + 1 : end + 1]
            out["weights"][row, at + fresh - begin : at + end - begin] = 1.0
            out["segments"][row, here] = segment
            out["positions"][row, here] = np.arange(end - begin)
            at += end - begin
    return out
