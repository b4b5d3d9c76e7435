"""Mixtures: rows of several sources in the shares that their weights say.

Legend: S sources, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.pretraining.next_sentence import PairRows
from llmctl.data.pretraining.objectives import Batch
from llmctl.data.pretraining.packing import PackedRows
from llmctl.data.shuffle import permutation

BLOCK = 1024
"""Rows in which the shares hold exactly, up to rounding; every source has a row in each block."""


@dataclass(frozen=True)
class Phase:
    """Blocks of rows with the same number of rows from each source."""

    start: int
    """First row."""
    blocks: float
    """How many blocks; infinite where no source is ever used up."""
    counts: np.ndarray
    """Rows of each source in a block [S]."""
    done: np.ndarray
    """Rows of each source before this phase [S]."""


class MixedRows:
    """Rows of S sources, shuffled block by block; row i is a pure function of the sources, the weights, the seed and i.

    A source that has had its epochs is used up, and the others share its place. Where all are, `total` is the number
    of rows there are, and rows beyond it raise RequestError; else `total` is None and rows are endless.
    """

    def __init__(
        self,
        sources: Sequence[PackedRows | PairRows],
        weights: Sequence[float],
        epochs: Sequence[float] = (),
        seed: int = 0,
    ):
        """`epochs`: how often each source may be read, 0 for ever; all for ever by default."""
        self._sources, self._seed = sources, seed
        limits = [
            np.inf if not e else max(1, round(e * len(s)))
            for e, s in zip(epochs or [0] * len(sources), sources, strict=True)
        ]
        self._phases = phases(np.array(weights, float), np.array(limits))
        last = self._phases[-1]
        end = last.start + last.blocks * last.counts.sum()
        self.total = None if np.isinf(end) else int(end)
        self._starts = np.array([p.start for p in self._phases])
        self.tokens = sum(s.tokens for s in sources)
        """Tokens of all sources, once."""
        self.waste = float(np.average([s.waste for s in sources], weights=weights))
        """Fraction of row places that hold padding, in the shares of the weights."""
        self.labelled = float(np.average([getattr(s, "labelled", 0.0) for s in sources], weights=weights))
        """Fraction of rows with a labelled next-sentence pair, in the shares of the weights."""

    def __len__(self) -> int:
        """Rows of all sources, once."""
        return sum(map(len, self._sources))

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Rows `rows_B` (any numbers >= 0) as arrays with leading [B]."""
        source_B, index_B = self.places(rows_B)
        order_B = np.argsort(source_B, kind="stable")
        parts = [self._sources[s].batch(index_B[source_B == s]) for s in np.unique(source_B)]
        back_B = np.argsort(order_B)
        return {name: np.concatenate([part[name] for part in parts])[back_B] for name in parts[0]}

    def places(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row the source and the row of that source."""
        if self.total is not None and rows_B.max() >= self.total:
            raise RequestError(f"the sources' epochs are used up after {self.total} rows; more epochs, or fewer steps")
        phase_B = np.searchsorted(self._starts, rows_B, "right") - 1
        width_B = np.array([p.counts.sum() for p in self._phases])[phase_B]
        block_B, slot_B = np.divmod(rows_B - self._starts[phase_B], width_B)
        source_B, index_B = np.empty_like(rows_B), np.empty_like(rows_B)
        for phase, block in np.unique(np.stack([phase_B, block_B]), axis=1).T:
            here_B = (phase_B == phase) & (block_B == block)
            counts, done = self._phases[phase].counts, self._phases[phase].done
            members = np.repeat(np.arange(len(counts)), counts)
            first = int(self._starts[phase] + block * counts.sum())  # names the block, over all phases
            members = members[permutation(len(members), self._seed, first)]
            # the k-th row of a source in the block, counted at each slot
            rank = np.empty(len(members), np.int64)
            for s in range(len(counts)):
                rank[members == s] = np.arange(counts[s])
            chosen = members[slot_B[here_B]]
            source_B[here_B] = chosen
            index_B[here_B] = done[chosen] + block * counts[chosen] + rank[slot_B[here_B]]
        return source_B, index_B


def phases(weights: np.ndarray, limits: np.ndarray) -> list[Phase]:
    """The blocks of a mixture whose sources are used up after `limits` rows (infinite for never)."""
    found: list[Phase] = []
    start, done = 0, np.zeros(len(weights), np.int64)
    while (done < limits).any():
        counts = shares(np.where(done < limits, weights, 0))
        left = limits - done
        whole = float(np.min(np.floor(left[counts > 0] / counts[counts > 0])))
        if whole >= 1:
            blocks = whole
        else:  # a source ends inside this block: a shorter block with what is left of it
            counts, blocks = np.minimum(counts, left).astype(np.int64), 1
        found.append(Phase(start, blocks, counts, done))
        if np.isinf(blocks):
            break
        start, done = start + int(blocks) * int(counts.sum()), done + int(blocks) * counts
    return found


def shares(weights: np.ndarray) -> np.ndarray:
    """Rows a block of each source, by largest remainder; at least one where the weight is not 0."""
    exact = weights / weights.sum() * BLOCK
    counts = np.maximum(np.floor(exact), weights > 0).astype(np.int64)
    short = BLOCK - int(counts.sum())
    if short > 0:
        counts[np.argsort(-(exact - counts), kind="stable")[:short]] += 1
    return counts
