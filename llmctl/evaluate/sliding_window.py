"""Split held-out documents into sliding windows that score each token exactly once, for every stride.

A document is `prefix + tokens`. A window has at most `context` inputs. The first window of a document scores all its
targets. Each later window scores `stride` new tokens, and its earlier tokens are context only. If the prefix begins
with a trained prompt, every later window also begins with the trained prompt.

Several windows are packed into one row as separate segments, and no token attends to another segment. Packing therefore
changes the cost, but never the score.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Documents(Protocol):
    """Define the type of tokenized documents: token ids by document number, such as a list of lists or a Corpus."""

    def __len__(self) -> int: ...

    def __getitem__(self, d: int, /) -> Sequence[int] | np.ndarray: ...


class Window(NamedTuple):
    """Describe a window: inputs [begin, end) of one document. Only targets of inputs from `fresh` on are scored."""

    document: int
    begin: int
    fresh: int
    end: int


def slide(document: int, inputs: int, context: int, stride: int) -> Iterable[Window]:
    """Yield the windows of a document with `inputs` inputs. Each input predicts one token.

    Raises:
        ValueError: If stride < 1 or stride > context. A larger stride would leave tokens unscored.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride ({stride}) must be between 1 and the context ({context})")
    fresh = 0
    while fresh < inputs:
        end = min(inputs, fresh + (stride if fresh else context))
        yield Window(document, max(0, end - context), fresh, end)
        fresh = end


def pack(lengths: Sequence[int], capacity: int, opens: int = 0) -> list[list[int]]:
    """Pack items into bins of size `capacity` by best fit, beginning with the longest item.

    The result is deterministic.

    Args:
        lengths: Length of each item.
        capacity: Maximum total length per bin.
        opens: Maximum length of an item that never opens a new bin. Such an item is left out if no bin has room.

    Returns:
        The indices of the items in each bin.

    Raises:
        ValueError: If an item exceeds the capacity.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free length, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] > capacity:
            raise ValueError(f"item of {lengths[item]} does not fit a bin of {capacity}")
        at = bisect_left(room, (lengths[item], -1))
        if at < len(room):
            free, where = room.pop(at)
        elif lengths[item] <= opens:
            continue
        else:
            free, where = capacity, len(bins)
            bins.append([])
        bins[where].append(item)
        insort(room, (free - lengths[item], where))
    return bins


class Rows:
    """Build language-model rows that score every token once.

    A row consists of the arrays `tokens`, `targets`, `weights`, `segments`, `positions` and `document`. Each has the
    length `context`. Rows are built when `batch` is called.
    """

    def __init__(
        self,
        documents: Documents,
        prefix: int | Sequence[int] | None,
        context: int,
        stride: int,
        given: Sequence[int] | None = None,
        repeated: int = 0,
    ) -> None:
        """Compute the windows and pack them into rows.

        Args:
            documents: Token ids of each document.
            prefix: Tokens that condition the first token, such as BOS; if None, first tokens are not scored.
            context: Maximum number of inputs per window, and the row length.
            stride: Number of newly scored tokens per window.
            given: Number of tokens at the beginning of each document (the prompt) that are context only.
            repeated: Number of tokens of a trained prompt, with which `prefix` begins. In every window after a
                document's first, these tokens replace the oldest inputs. 0 without a trained prompt.

        Raises:
            ValueError: If `stride` is above `context - repeated`. Windows would then score targets of repeated tokens.
        """
        if repeated and stride > context - repeated:
            raise ValueError(f"stride ({stride}) must be at most {context - repeated}: {repeated} inputs are repeated")
        self._documents, self._context, self._repeated = documents, context, repeated
        self._start = np.array([] if prefix is None else prefix, np.int32).reshape(-1)
        self._windows: list[Window] = []
        for d in range(len(documents)):
            # Input i predicts entry i + 1 of the sequence, which starts with the prefix.
            known = max((given[d] if given is not None else 0) + len(self._start) - 1, 0)
            for w in slide(d, len(self._start) + len(documents[d]) - 1, context, stride):
                self._windows.append(w._replace(fresh=min(max(w.fresh, known), w.end)))
        self._bins = pack([w.end - w.begin for w in self._windows], context)

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def scored(self) -> int:
        """Return the number of scored targets in all rows."""
        return int(self.scored_per_document.sum())

    @property
    def scored_per_document(self) -> np.ndarray:
        """Return the number of scored targets of each document, int64 [D]."""
        scored_D = np.zeros(len(self._documents), np.int64)
        for w in self._windows:
            scored_D[w.document] += w.end - w.fresh
        return scored_D

    def batch(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        """Build the rows with the numbers `rows_B`.

        Returns:
            Arrays [B, context] by name. `weights` is float32. `tokens`, `targets`, `segments`, `positions` and
            `document` (the document's number) are int32.
        """
        names = ("tokens", "targets", "weights", "segments", "positions", "document")
        shape = (len(rows_B), self._context)
        out: dict[str, np.ndarray] = {n: np.zeros(shape, np.float32 if n == "weights" else np.int32) for n in names}
        for row, members in enumerate(self._bins[i] for i in rows_B):
            at = 0
            for segment, member in enumerate(members, 1):
                document, begin, fresh, end = self._windows[member]
                sequence = np.concatenate([self._start, np.asarray(self._documents[document], np.int32)])
                here = slice(at, at + end - begin)
                out["tokens"][row, here] = sequence[begin:end]
                if begin:
                    out["tokens"][row, at : at + self._repeated] = self._start[: self._repeated]
                out["targets"][row, here] = sequence[begin + 1 : end + 1]
                out["weights"][row, at + fresh - begin : at + end - begin] = 1.0
                out["segments"][row, here] = segment
                out["document"][row, here] = document
                out["positions"][row, here] = np.arange(end - begin)
                at += end - begin
        return out
